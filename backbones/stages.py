"""The stages: CSPNet's, with a path across the blocks, and the plain network's, without. All are
[N, cin, H, W] -> [N, cout, H/stride, W/stride].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from backbones.blocks import Activation, Block, ConvNormAct, run_blocks
from backbones.errors import InputError

Fusion = Literal["both", "first", "last"]


@dataclass(frozen=True)
class Resolution:
    """How a stage meets its resolution: by `stride`, or by dilating its convolutions instead.

    `first` is the dilation of the convolution that would downsample, `dilation` that of the blocks.
    """

    stride: int
    first: int = 1
    dilation: int = 1


@dataclass(frozen=True)
class Blocks:
    """The blocks of a stage: `len(drop_path)` of them, of `width` channels and `hidden` inside."""

    block: Callable[..., Block]
    width: int
    hidden: int
    groups: int
    act: Activation
    se: float | None
    drop_path: Sequence[float]

    def build(self, cin: int, dilation: int, stride: int = 1, first: int | None = None) -> nn.Sequential:
        """The first takes `cin` channels and strides, or dilates by `first` instead; the rest keep their shape."""
        shapes = [(cin, stride, first)] + [(self.width, 1, None)] * (len(self.drop_path) - 1)
        return nn.Sequential(
            *(
                self.block(cin, self.width, self.hidden, stride, self.groups, dilation, self.act, self.se, rate, first)
                for (cin, stride, first), rate in zip(shapes, self.drop_path, strict=True)
            )
        )


def downsample(cin: int, cout: int, at: Resolution, groups: int, average: bool, act: Activation) -> nn.Module:
    """A 3x3 convolution of stride 2, or an average over 2x2 and a 1x1 convolution."""
    if average:
        pool = nn.AvgPool2d(2) if at.stride == 2 else nn.Identity()
        return nn.Sequential(pool, ConvNormAct(cin, cout, 1, groups=groups, act=act))
    return ConvNormAct(cin, cout, 3, at.stride, groups, at.first, act)


class CrossStage(nn.Module):
    """CSPNet's stage: downsample, expand, send a part of the channels through the blocks, join, fuse.

        conv_down -> conv_exp -+-- cross -----------------------------------+-> concat -> conv_transition
                               +-- blocks ------------- conv_transition_b --+

    `fusion` says which transitions there are (the paper's figure 3): `both`; `first`, the one after the
    concatenation, which is timm's CS3; or `last`, the one before it. With `first` the blocks' channels come first.
    The authors' two 1x1 convolutions, one a path, equal one convolution and a split of its output.

    Args:
        expand: channels of the expansion.
        gamma: share of them that crosses; the rest, rounded, goes through the blocks.
        cout: where `fusion` is `last`, what crosses and the blocks' width together.
        grow_first: the downsampling convolution already widens to `cout`.
        linear_expand: no activation after the expansion.

    Raises:
        InputError: `gamma` leaves nothing for the blocks, or `cout` is not what comes out.
    """

    def __init__(
        self, cin: int, cout: int, at: Resolution, blocks: Blocks, *, expand: int, gamma: float, fusion: Fusion,
        down: bool, average_down: bool, grow_first: bool, linear_expand: bool,
    ):  # fmt: skip
        super().__init__()
        act = blocks.act
        if down:
            grown = cout if grow_first or average_down else cin
            self.conv_down = downsample(cin, grown, at, blocks.groups, average_down, act)
            cin = grown
        else:
            self.conv_down = nn.Identity()
        self.fusion, self.checkpointing = fusion, False
        self.cross = round(expand * gamma)
        self.through = expand - self.cross
        if self.through < 1 or self.cross < 0:
            raise InputError(f"gamma={gamma} of {expand} channels leaves none for the blocks: give 0 <= gamma < 1")
        if fusion == "last" and cout != self.cross + blocks.width:
            raise InputError(
                f"fusion=last gives {self.cross} + {blocks.width} channels, not {cout}: say so in channels"
            )
        self.conv_exp = ConvNormAct(cin, expand, 1, act=None if linear_expand else act)
        self.blocks = blocks.build(self.through, at.dilation)
        if fusion != "first":
            # Back to an even share, as timm and the authors do.
            self.conv_transition_b = ConvNormAct(blocks.width, blocks.width, 1, act=act)
        if fusion != "last":
            self.conv_transition = ConvNormAct(self.cross + blocks.width, cout, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_exp(self.conv_down(x))  # [N, expand, H/stride, W/stride]
        if self.fusion == "first":
            through, cross = x.split((self.through, self.cross), dim=1)
            x = torch.cat((run_blocks(self.blocks, through, self.checkpointing), cross), dim=1)
            return self.conv_transition(x)  # [N, cout, ...]
        cross, through = x.split((self.cross, self.through), dim=1)  # the paper's split
        through = self.conv_transition_b(run_blocks(self.blocks, through, self.checkpointing))
        x = torch.cat((cross, through), dim=1)
        return x if self.fusion == "last" else self.conv_transition(x)  # [N, cout, ...]


class PlainStage(nn.Module):
    """The same blocks on all channels. DarkNet downsamples and widens by a convolution before them; without `down`
    the first block does it, as ResNet's.
    """

    def __init__(self, cin: int, cout: int, at: Resolution, blocks: Blocks, *, down: bool, average_down: bool):
        super().__init__()
        self.checkpointing = False
        if down:
            self.conv_down = downsample(cin, cout, at, blocks.groups, average_down, blocks.act)
            self.blocks = blocks.build(cout, at.dilation)
        else:
            self.conv_down = nn.Identity()
            self.blocks = blocks.build(cin, at.dilation, at.stride, at.first)

    def forward(self, x: Tensor) -> Tensor:
        return run_blocks(self.blocks, self.conv_down(x), self.checkpointing)
