"""The table of variants: every network, a row each, as data.

Four groups: timm's CSP family, whose published weights they load, under the same parameter names; small ones for
tests and laptops; the paper's own networks as the authors' Darknet configs define them (`_paper`); and the DenseNet
side of the paper, from `dense.py`. A row's `plain` is its twin without a cross-stage path, `NAME_plain`.

Deviations of timm's rows from the paper: one 1x1 convolution feeds both paths and its output is split in half,
where the authors' configs have one a path (equal in function) and an uneven split in the first stage; LeakyReLU's
slope is 0.01, not Darknet's 0.1; CSPResNeXt's downsampling is grouped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from backbones.blocks import (
    Activation,
    BasicBlock,
    Block,
    Bottleneck,
    ConvNormAct,
    DarkBlock,
    EdgeBlock,
    leaky_relu,
    leaky_relu_darknet,
    silu,
)  # fmt: skip
from backbones.dense import CSP_DENSENET201_ELASTIC, CSP_PELEENET, DenseVariant
from backbones.stages import Blocks, CrossStage, Fusion, PlainStage, Resolution

T = TypeVar("T")


@dataclass(frozen=True)
class Stem:
    """Convolutions of 3x3 or so, the first of stride 2 unless `stride` is 1, then a max-pool of stride 2 if `pool`."""

    channels: tuple[int, ...]
    kernel: int
    stride: int  # of all
    pool: int = 0  # the pool's kernel

    def build(self, act: Activation) -> nn.Sequential:
        """[N, 3, H, W] -> [N, channels[-1], H/stride, W/stride]."""
        stem, cin = nn.Sequential(), 3
        for i, cout in enumerate(self.channels):
            stride = 2 if i == 0 and self.stride > 1 else 1
            stem.add_module(f"conv{i + 1}", ConvNormAct(cin, cout, self.kernel, stride, act=act))
            cin = cout
        if self.pool:
            even = self.pool % 2 == 0  # Darknet's pool of 2x2 pads at the right and the bottom alone
            stem.add_module("pool", nn.MaxPool2d(self.pool, 2, padding=(self.pool - 1) // 2, ceil_mode=even))
        return stem


@dataclass(frozen=True)
class Variant:
    """One row of the table. A tuple has one entry a stage; where a single value will do, it is of all stages."""

    block: Callable[..., Block]
    stem: Stem
    depths: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    bottleneck: float | tuple[float, ...]  # channels inside a block over the block's
    block_ratio: float | tuple[float, ...] = 1.0  # the blocks' channels over the stage's
    groups: int | tuple[int, ...] = 1
    act: Activation = leaky_relu
    se: float | None = None  # squeeze-and-excitation's share of channels
    average_down: bool = False
    strided_blocks: bool = False  # the first block downsamples, instead of a convolution before it
    # of the cross-stage path; without `fusion` there is none and the network is plain
    fusion: Fusion | None = "both"
    expand: float | tuple[float, ...] = 1.0  # the expansion's channels over the stage's
    gamma: float | tuple[float, ...] = 0.5  # share of them that crosses
    grow_first: bool = False
    linear_expand: bool | tuple[bool, ...] = False
    plain: "Variant | None" = None

    @property
    def stem_channels(self) -> int:
        return self.stem.channels[-1]

    @property
    def stem_stride(self) -> int:
        return self.stem.stride

    def build_stem(self) -> nn.Sequential:
        return self.stem.build(self.act)

    def build_stage(self, i: int, cin: int, at: Resolution, drop_path: Sequence[float]) -> nn.Module:
        """Stage `i` over `cin` channels; `drop_path` has a rate a block."""
        cout = self.channels[i]
        width = round(cout * _of(self.block_ratio, i))
        hidden = round(width * _of(self.bottleneck, i))
        blocks = Blocks(self.block, width, hidden, _of(self.groups, i), self.act, self.se, drop_path)
        if self.fusion is None:
            down = self.strides[i] != 1 and not self.strided_blocks
            return PlainStage(cin, cout, at, blocks, down=down, average_down=self.average_down)
        return CrossStage(
            cin, cout, at, blocks, expand=round(cout * _of(self.expand, i)), gamma=_of(self.gamma, i),
            fusion=self.fusion, down=self.strides[i] != 1, average_down=self.average_down,
            grow_first=self.grow_first, linear_expand=_of(self.linear_expand, i),
        )  # fmt: skip


def _of(value: T | tuple[T, ...], i: int) -> T:
    return value[i] if isinstance(value, tuple) else value


def _plain(variant: Variant) -> Variant:
    """The twin of a network whose blocks see half of a stage's channels: they see all, as wide inside as before."""
    ratios, bottlenecks = variant.block_ratio, variant.bottleneck
    inner = tuple(_of(ratios, i) * _of(bottlenecks, i) for i in range(len(variant.depths)))
    return replace(variant, fusion=None, plain=None, block_ratio=1.0, bottleneck=inner)


def _with_plain(variant: Variant) -> Variant:
    return replace(variant, plain=_plain(variant))


_DEEP_STEM = Stem((32, 32, 64), kernel=3, stride=4, pool=3)
_PLAIN_RESNET = Variant(
    block=Bottleneck,
    stem=Stem((64,), kernel=7, stride=4, pool=3),
    depths=(3, 4, 6, 3),
    channels=(256, 512, 1024, 2048),
    strides=(1, 2, 2, 2),
    bottleneck=0.25,
    strided_blocks=True,
    fusion=None,
)
_RESNET = replace(
    _PLAIN_RESNET,
    depths=(3, 3, 5, 2),
    channels=(128, 256, 512, 1024),
    bottleneck=0.5,
    strided_blocks=False,
    fusion="both",
    expand=2.0,
    linear_expand=True,
    plain=_PLAIN_RESNET,
)
_PLAIN_RESNEXT = replace(_PLAIN_RESNET, bottleneck=0.5, groups=32)
_RESNEXT = replace(
    _RESNET,
    channels=(256, 512, 1024, 2048),
    bottleneck=1.0,
    block_ratio=0.5,
    groups=32,
    expand=1.0,
    plain=_PLAIN_RESNEXT,
)
_DARKNET = Variant(
    block=DarkBlock,
    stem=Stem((32,), kernel=3, stride=1),
    depths=(1, 2, 8, 8, 4),
    channels=(64, 128, 256, 512, 1024),
    strides=(2, 2, 2, 2, 2),
    bottleneck=0.5,
    fusion=None,
)
_CSPDARKNET = replace(
    _DARKNET,
    bottleneck=(0.5, 1.0, 1.0, 1.0, 1.0),
    block_ratio=(1.0, 0.5, 0.5, 0.5, 0.5),
    fusion="both",
    expand=(2.0, 1.0, 1.0, 1.0, 1.0),
    grow_first=True,
    plain=_DARKNET,
)


def _darknet_style(variant: Variant) -> Variant:
    """Darknet's activation and its pool of 2x2."""
    return replace(variant, act=leaky_relu_darknet, stem=replace(variant.stem, pool=2))


_PAPER_RESNET = _darknet_style(
    replace(
        _RESNET, expand=(1.5, 2.0, 2.0, 2.0), gamma=(2 / 3, 0.5, 0.5, 0.5), linear_expand=(False, True, True, False),
        plain=_darknet_style(_PLAIN_RESNET),
    )
)  # fmt: skip


_PLAIN_RESNET10 = replace(
    _darknet_style(_PLAIN_RESNET), block=BasicBlock, depths=(1, 1, 1, 1), channels=(64, 128, 256, 512), bottleneck=1.0
)
# The authors published no config of CSPResNet-10: this one is ours, with ResNet-10's maps and the published cost.
_PAPER_RESNET10 = replace(
    _PLAIN_RESNET10,
    bottleneck=(2 / 3, 1.0, 1.0, 1.0),
    block_ratio=(1.5, 0.375, 0.375, 0.375),
    strided_blocks=False,
    fusion="both",
    expand=(2.0, 0.75, 0.75, 0.75),
    plain=_PLAIN_RESNET10,
)


def _cs3(width: float = 1.0, depth: float = 1.0, focus: bool = False, **changes: Any) -> Variant:
    """timm's CS3: the transition before the concatenation left out, SiLU, a deeper stem or a 6x6 one."""
    if focus:  # equal to YOLOv5's focus layer
        stem = Stem((round(64 * width),), kernel=6, stride=2)
    else:
        stem = Stem((round(32 * width), round(64 * width)), kernel=3, stride=2)
    variant = Variant(
        block=DarkBlock,
        stem=stem,
        depths=tuple(int(blocks * depth) for blocks in (3, 6, 9, 3)),
        channels=tuple(round(channels * width) for channels in (128, 256, 512, 1024)),
        strides=(2, 2, 2, 2),
        bottleneck=1.0,
        block_ratio=0.5,
        act=silu,
        fusion="first",
    )
    return _with_plain(replace(variant, **changes))


VARIANTS: dict[str, Variant | DenseVariant] = {
    # timm's family
    "cspresnet50": _RESNET,
    "cspresnet50d": replace(_RESNET, stem=_DEEP_STEM, plain=replace(_PLAIN_RESNET, stem=_DEEP_STEM)),
    "cspresnet50w": replace(
        _RESNET, stem=_DEEP_STEM, channels=(256, 512, 1024, 2048), bottleneck=0.25, block_ratio=0.5, expand=1.0,
        plain=replace(_PLAIN_RESNET, stem=_DEEP_STEM),
    ),
    "cspresnext50": _RESNEXT,
    "cspdarknet50": _CSPDARKNET,
    "darknet17": replace(_DARKNET, depths=(1, 1, 1, 1, 1)),
    "darknet21": replace(_DARKNET, depths=(1, 1, 1, 2, 2)),
    "sedarknet21": replace(_DARKNET, depths=(1, 1, 1, 2, 2), se=1 / 16),
    "darknet53": _DARKNET,
    "darknetaa53": replace(_DARKNET, average_down=True),
    "cs3darknet_s": _cs3(0.5, 0.5),
    "cs3darknet_m": _cs3(0.75, 0.67),
    "cs3darknet_l": _cs3(),
    "cs3darknet_x": _cs3(1.25, 1.33),
    "cs3darknet_focus_s": _cs3(0.5, 0.5, focus=True),
    "cs3darknet_focus_m": _cs3(0.75, 0.67, focus=True),
    "cs3darknet_focus_l": _cs3(focus=True),
    "cs3darknet_focus_x": _cs3(1.25, 1.33, focus=True),
    "cs3sedarknet_l": _cs3(se=1 / 4),
    "cs3sedarknet_x": _cs3(1.25, 1.33, se=1 / 16),
    "cs3sedarknet_xdw": _cs3(
        se=1 / 16, block=Bottleneck, depths=(3, 6, 12, 4), channels=(256, 512, 1024, 2048), bottleneck=0.5,
        groups=(1, 1, 256, 512), fusion="both",
    ),
    "cs3edgenet_x": _cs3(1.25, 1.33, block=EdgeBlock, bottleneck=1.5),
    "cs3se_edgenet_x": _cs3(1.25, 1.33, block=EdgeBlock, bottleneck=1.5, se=1 / 4),
    # the paper's own, as the authors' configs have them
    "cspresnet50_paper": _PAPER_RESNET,
    "cspresnext50_paper": replace(
        _PAPER_RESNET, channels=(256, 512, 1024, 2048), bottleneck=1.0, block_ratio=0.5, groups=32,
        expand=(0.75, 1.0, 1.0, 1.0), plain=_darknet_style(_PLAIN_RESNEXT),
    ),
    "cspdarknet53_paper": replace(_CSPDARKNET, act=leaky_relu_darknet, plain=replace(_DARKNET, act=leaky_relu_darknet)),
    "cspresnet10_paper": _PAPER_RESNET10,
    "cspdensenet201_elastic": CSP_DENSENET201_ELASTIC,
    "csppeleenet": CSP_PELEENET,
    # small ones, ours; nobody published weights of them
    "cspresnet10": _with_plain(
        replace(
            _RESNET, stem=Stem((32,), 7, 4, pool=3), depths=(1, 1, 1, 1), channels=(64, 128, 256, 512),
            block_ratio=0.5, expand=1.0,
        )
    ),
    "cspresnext10": _with_plain(
        replace(_RESNEXT, stem=Stem((32,), 7, 4, pool=3), depths=(1, 1, 1, 1), channels=(64, 128, 256, 512), groups=8)
    ),
    "cspdarknet10": _with_plain(
        replace(_CSPDARKNET, stem=Stem((16,), 3, 1), depths=(1, 1, 1, 1, 1), channels=(32, 64, 128, 256, 512))
    ),
}  # fmt: skip
