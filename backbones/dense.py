"""The DenseNet side of the paper: DenseNet-201-Elastic and PeleeNet, with a cross-stage path and without.

Papers: CSPNet, arXiv 1911.11929, figures 2 and 3; Elastic, arXiv 1812.05262; PeleeNet, arXiv 1804.06882.
A stage opens with the transition that closes the one before, so that its own map has its own resolution:

    transition, pool -> split -+-- cross -------------------+-> concat -> [transition]   in the last stage
                               +-- dense -> layer -> ... ---+

The plain networks are their authors', with the LeakyReLU that CSPNet's authors gave PeleeNet, and with pools that round
up at odd sizes. Of the two with a cross-stage path only costs were published. What those leave open is filled in such
that they come out, and is ours: where the pool stands among the transitions, the transitions' widths, and that
CSPPeleeNet's first stage has no transition before the concatenation.

The published costs are of 224 x 224 pixels. Those of DenseNet-201-Elastic, 8.77 BFLOPs and with the cross-stage path
7.13, also count BatchNorm, ReLU and pools. So counted ours are 8.77 and 7.16; by convolutions alone 8.53 and 6.96.

Shapes: N images, C channels, H x W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from backbones.blocks import Activation, ConvNormAct, leaky_relu_darknet, run_blocks
from backbones.stages import Fusion, Resolution

Pool = Literal["before", "between", "after"]


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def average_pool(stride: int) -> nn.Module:
    """[N, C, H, W] -> [N, C, H/stride, W/stride], rounded up as strided convolutions do."""
    return nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()


class NormActConv(nn.Module):
    """DenseNet's order: BatchNorm, activation, convolution without bias; keeps the resolution."""

    def __init__(self, cin: int, cout: int, kernel: int, dilation: int = 1, act: Activation = relu):
        super().__init__()
        self.bn = nn.BatchNorm2d(cin)
        self.act = act()
        self.conv = nn.Conv2d(cin, cout, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(self.bn(x)))


class TwoWay(nn.Module):
    """PeleeNet's layer, [N, cin, H, W] -> [N, growth, H, W]: half of the output sees 3x3 pixels, the other half 5x5."""

    def __init__(self, cin: int, growth: int, hidden: int, dilation: int, act: Activation):
        super().__init__()
        half = growth // 2
        wide = partial(ConvNormAct, kernel=3, dilation=dilation, act=act)
        self.branch1 = nn.Sequential(ConvNormAct(cin, hidden, 1, act=act), wide(hidden, half))
        self.branch2 = nn.Sequential(ConvNormAct(cin, hidden, 1, act=act), wide(hidden, half), wide(half, half))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch2(x)), dim=1)


class Elastic(nn.Module):
    """Elastic's layer, [N, cin, H, W] -> [N, growth, H, W]: a bottleneck at full and one at a `scale`-th resolution."""

    def __init__(self, cin: int, growth: int, hidden: int, dilation: int, act: Activation, scale: int = 2):
        super().__init__()
        wide = partial(NormActConv, hidden, growth, 3, dilation, act)
        self.scale = scale
        self.norm = nn.Sequential(nn.BatchNorm2d(cin), act())
        self.high = nn.Sequential(nn.Conv2d(cin, hidden, 1, bias=False), wide())
        self.low = nn.Sequential(average_pool(scale), nn.Conv2d(cin, hidden, 1, bias=False), wide())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        high, low = self.high(x), self.low(x)  # [N, growth, H, W], [N, growth, H/scale, W/scale]
        if self.scale > 1:
            low = F.interpolate(low, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return high + low


class DenseLayer(nn.Module):
    """DenseNet's step, [N, cin, H, W] -> [N, cin + growth, H, W]: the input, and behind it what `layer` makes of it.

    `drop_path` leaves out a sample's new channels.
    """

    def __init__(self, layer: nn.Module, drop_path: float):
        super().__init__()
        self.layer = layer
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.drop_path(self.layer(x))), dim=1)


class Partial(nn.Module):
    """A transition beside the cross-stage path: the first `cross` channels stay, `module` has the others."""

    def __init__(self, cross: int, module: nn.Module):
        super().__init__()
        self.cross, self.module = cross, module

    def forward(self, x: Tensor) -> Tensor:
        if not self.cross:
            return self.module(x)
        return torch.cat((x[:, : self.cross], self.module(x[:, self.cross :])), dim=1)


def transition(
    cross: int, dense: int, kept: int, cout: int, *, fusion: Fusion, pool: Pool, stride: int,
    conv: Callable[[int, int, int], nn.Module],
) -> nn.Sequential:  # fmt: skip
    """[N, cross + dense, H, W] -> [N, cout, H/stride, W/stride].

    Args:
        fusion: `first`, one 1x1 convolution over all channels, which with `cross=0` is DenseNet's transition; `last`,
            one over the dense part, to `kept` channels; `both`, that one and then one over all.
        pool: where the pool of `stride` stands: before, between or after those two.
    """
    steps = nn.Sequential()
    average = average_pool(stride)
    if pool == "before":
        steps.add_module("pool", average)
    if fusion != "first":
        steps.add_module("conv_transition_b", Partial(cross, conv(dense, kept, 1)))
        dense = kept
    if pool == "between":
        steps.add_module("pool", average)
    if fusion != "last":
        steps.add_module("conv_transition", conv(cross + dense, cout, 1))
    if pool == "after":
        steps.add_module("pool", average)
    return steps


class DenseStage(nn.Module):
    """[N, C, H, W] -> [N, C', H/stride, W/stride]: `opening`, the partial dense block, `closing`.

    Args:
        cin: channels that `opening` gives.
        gamma: share of them that crosses; 0 is DenseNet's block.
        layer: makes a layer that gives `growth` channels from as many as it is told.
        drop_path: a rate a layer.
    """

    def __init__(
        self, cin: int, layer: Callable[[int], nn.Module], drop_path: Sequence[float], *, growth: int, gamma: float,
        opening: nn.Module, closing: nn.Module,
    ):  # fmt: skip
        super().__init__()
        self.opening, self.closing, self.checkpointing = opening, closing, False
        self.cross = round(cin * gamma)
        inputs = range(cin - self.cross, cin - self.cross + growth * len(drop_path), growth)
        self.blocks = nn.Sequential(
            *(DenseLayer(layer(channels), rate) for channels, rate in zip(inputs, drop_path, strict=True))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.opening(x)  # [N, cin, H/stride, W/stride]
        dense = run_blocks(self.blocks, x[:, self.cross :], self.checkpointing)
        return self.closing(torch.cat((x[:, : self.cross], dense), dim=1) if self.cross else dense)


class PeleeStem(nn.Module):
    """[N, C, H, W] -> [N, C, H/2, W/2]: two convolutions beside a max-pool, then one over both."""

    def __init__(self, channels: int, act: Activation):
        super().__init__()
        self.branch = nn.Sequential(
            ConvNormAct(channels, channels // 2, 1, act=act), ConvNormAct(channels // 2, channels, 3, 2, act=act)
        )
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.fuse = ConvNormAct(2 * channels, channels, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(torch.cat((self.pool(x), self.branch(x)), dim=1))


def pelee_stem(channels: int, act: Activation) -> nn.Sequential:
    return nn.Sequential(ConvNormAct(3, channels, 3, 2, act=act), PeleeStem(channels, act))


def densenet_stem(channels: int, act: Activation) -> nn.Sequential:
    return nn.Sequential(ConvNormAct(3, channels, 7, 2, act=act), nn.MaxPool2d(3, 2, padding=1))


@dataclass(frozen=True)
class Widths:
    """Channels along a stage: the dense block's input, the part of it that crosses, the block's output, and what the
    transition after it keeps of that and gives in all.
    """

    cin: int
    cross: int
    dense: int
    kept: int
    cout: int


@dataclass(frozen=True)
class DenseVariant:
    """One row of the table, on the DenseNet side. A tuple has one entry a stage; so has what follows a stage."""

    stem: Callable[[int, Activation], nn.Sequential]
    stem_channels: int
    layer: tuple[Callable[..., nn.Module], ...]
    depths: tuple[int, ...]
    hidden: tuple[int, ...]  # channels inside a layer, of each branch
    conv: Callable[..., nn.Module]  # of the transitions
    act: Activation
    compression: float  # a transition's channels over those before it; the last stage's map keeps its channels
    fusion: tuple[Fusion, ...]
    pool: tuple[Pool, ...]
    gamma: float = 0.5  # share of a stage's input that crosses; with 0 and `first` the network is plain
    growth: int = 32  # channels that a layer adds
    closes: bool = True  # a transition follows the last stage too
    final_norm: bool = False
    strides: tuple[int, ...] = (1, 2, 2, 2)
    stem_stride: int = 4
    plain: "DenseVariant | None" = None

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the stages' maps."""
        *inner, last = self.widths
        return (*(w.cross + w.dense for w in inner), last.cout if self.closes else last.cross + last.dense)

    @property
    def widths(self) -> list[Widths]:
        cin, widths = self.stem_channels, []
        for i, (depth, fusion) in enumerate(zip(self.depths, self.fusion, strict=True)):
            cross = round(cin * self.gamma)
            dense = cin - cross + depth * self.growth
            kept = dense if fusion == "first" else int(dense * self.compression)
            cout = cross + dense if i == len(self.depths) - 1 else int((cross + dense) * self.compression)
            widths.append(Widths(cin, cross, dense, kept, cross + kept if fusion == "last" else cout))
            cin = widths[-1].cout
        return widths

    def build_stem(self) -> nn.Sequential:
        """[N, 3, H, W] -> [N, stem_channels, H/4, W/4], in two modules of stride 2."""
        return self.stem(self.stem_channels, self.act)

    def build_stage(self, i: int, cin: int, at: Resolution, drop_path: Sequence[float]) -> nn.Module:
        """Stage `i` over the map of `cin` channels below it; `drop_path` has a rate a layer."""
        assert cin == (self.channels[i - 1] if i else self.stem_channels)
        opening = self._transition(i - 1, at.stride) if i else nn.Sequential()
        closing = nn.Sequential()
        if i == len(self.depths) - 1:
            closing = self._transition(i, stride=1) if self.closes else closing
            if self.final_norm:
                closing.append(nn.BatchNorm2d(self.channels[i])).append(self.act())
        layer = partial(
            self.layer[i], growth=self.growth, hidden=self.hidden[i], dilation=at.dilation, act=self.act
        )  # fmt: skip
        return DenseStage(
            self.widths[i].cin, layer, drop_path, growth=self.growth, gamma=self.gamma, opening=opening,
            closing=closing,
        )  # fmt: skip

    def _transition(self, i: int, stride: int) -> nn.Sequential:
        """What follows stage `i`."""
        w, conv = self.widths[i], partial(self.conv, act=self.act)
        return transition(
            w.cross, w.dense, w.kept, w.cout, fusion=self.fusion[i], pool=self.pool[i], stride=stride, conv=conv
        )


def _plain(variant: DenseVariant) -> DenseVariant:
    return replace(variant, gamma=0.0, fusion=("first",) * 4, pool=("after",) * 4)


_CSP_DENSENET201_ELASTIC = DenseVariant(
    stem=densenet_stem,
    stem_channels=64,
    # The authors leave maps of 7 x 7 at their scale: the last stage's, at 224 x 224 pixels.
    layer=(Elastic, Elastic, Elastic, partial(Elastic, scale=1)),
    depths=(10, 20, 40, 30),
    hidden=(64, 64, 64, 64),
    conv=NormActConv,
    act=relu,
    compression=0.5,
    fusion=("both",) * 4,
    pool=("before",) * 4,
    final_norm=True,
)
CSP_DENSENET201_ELASTIC = replace(
    _CSP_DENSENET201_ELASTIC, plain=replace(_plain(_CSP_DENSENET201_ELASTIC), closes=False)
)  # fmt: skip

_CSP_PELEENET = DenseVariant(
    stem=pelee_stem,
    stem_channels=32,
    layer=(TwoWay,) * 4,
    depths=(3, 4, 8, 6),
    hidden=(16, 32, 64, 64),
    conv=ConvNormAct,
    act=leaky_relu_darknet,
    compression=1.0,
    fusion=("first", "both", "both", "both"),
    pool=("after", "between", "between", "between"),
)
CSP_PELEENET = replace(_CSP_PELEENET, plain=_plain(_CSP_PELEENET))
