"""CSPNet: blocks, stages, the network, the table of variants, and `create_model`. Read this file first.

Paper: Wang et al., "CSPNet: A New Backbone that can Enhance Learning Capability of CNN", arXiv 1911.11929.
The variants are those of timm's `cspnet.py`, whose published weights they load, under the same parameter names.
Deviations from the paper, as in timm: one 1x1 convolution feeds both paths and its output is split in
half, where the authors' Darknet configs have one convolution a path (equal in function) and an uneven split
in the first stage; CSPResNeXt's downsampling is grouped.

Shapes: N images, C channels, H x W pixels; a map cK has stride 2^K.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.errors import unknown
from backbones.preprocess import ClassifierPreprocess
from backbones.weights import load_weights

# timm's evaluation of the published weights: 256 pixels are 0.887 of the resized short side.
TIMM = ClassifierPreprocess(resize=288, crop=256, interpolation="bilinear")


class ConvNormAct(nn.Module):
    """Convolution without bias, BatchNorm, LeakyReLU(0.01) unless linear; [N, C, H, W] -> [N, C', H', W']."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.act = nn.Identity() if linear else nn.LeakyReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """ResNe(X)t's block: 1x1, 3x3, linear 1x1, sum, activation; keeps the shape."""

    def __init__(self, channels: int, bottleneck: float, groups: int):
        super().__init__()
        hidden = round(channels * bottleneck)
        self.conv1 = ConvNormAct(channels, hidden, 1)
        self.conv2 = ConvNormAct(hidden, hidden, 3, groups=groups)
        self.conv3 = ConvNormAct(hidden, channels, 1, linear=True)
        self.act3 = nn.LeakyReLU(inplace=True)
        nn.init.zeros_(self.conv3.bn.weight)  # a fresh block is the identity

    def forward(self, x: Tensor) -> Tensor:
        return self.act3(self.conv3(self.conv2(self.conv1(x))) + x)


class DarkBlock(nn.Module):
    """DarkNet's block: 1x1, 3x3, sum, no activation after it; keeps the shape."""

    def __init__(self, channels: int, bottleneck: float, groups: int):
        super().__init__()
        hidden = round(channels * bottleneck)
        self.conv1 = ConvNormAct(channels, hidden, 1)
        self.conv2 = ConvNormAct(hidden, channels, 3, groups=groups)
        nn.init.zeros_(self.conv2.bn.weight)  # a fresh block is the identity

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x)) + x


class CSPStage(nn.Module):
    """[N, cin, H, W] -> [N, cout, H/stride, W/stride].

    Downsample, expand to `2 * width` channels, send the second half through the blocks, join, fuse:

        conv_down -> conv_exp -+-- first half ----------------------------+-> concat -> conv_transition
                               +-- second half -> blocks -> conv_transition_b -+

    With `grow_first` the downsampling convolution already widens to `cout`; with `linear_expand` the
    expansion has no activation.
    """

    def __init__(
        self,
        block: Callable[[int, float, int], nn.Module],
        cin: int,
        cout: int,
        stride: int,
        depth: int,
        width: int,
        bottleneck: float,
        groups: int,
        grow_first: bool,
        linear_expand: bool,
    ):
        super().__init__()
        down = cout if grow_first else cin
        self.conv_down = nn.Identity() if stride == 1 else ConvNormAct(cin, down, 3, stride, groups)
        self.conv_exp = ConvNormAct(cin if stride == 1 else down, 2 * width, 1, linear=linear_expand)
        self.blocks = nn.Sequential(*(block(width, bottleneck, groups) for _ in range(depth)))
        self.conv_transition_b = ConvNormAct(width, width, 1)
        self.conv_transition = ConvNormAct(2 * width, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_exp(self.conv_down(x))  # [N, 2 * width, H/stride, W/stride]
        cross, blocks = x.chunk(2, dim=1)  # the paper's split: two of [N, width, ...]
        blocks = self.conv_transition_b(self.blocks(blocks))
        return self.conv_transition(torch.cat((cross, blocks), dim=1))  # [N, cout, ...]


class Head(nn.Module):
    """Average over the map, then a linear layer: [N, C, H, W] -> [N, num_classes]; without classes [N, C]."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True)
class Stem:
    """One convolution of stride 2 and a 3x3 max-pool of stride 2 (`stride=4`), or the convolution alone."""

    channels: int
    kernel: int
    stride: int


@dataclass(frozen=True)
class Published:
    """Accuracy that others published, in percent, with the protocol it was measured under."""

    by: str
    preprocess: ClassifierPreprocess
    top1: float
    top5: float


@dataclass(frozen=True)
class Variant:
    """One row of the table. A tuple has one entry a stage."""

    block: Callable[[int, float, int], nn.Module]
    stem: Stem
    depths: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    expand: tuple[float, ...]  # expansion's channels over the stage's; half of them goes through the blocks
    bottleneck: tuple[float, ...]
    groups: int = 1
    grow_first: bool = False
    linear_expand: bool = False
    hub: str | None = None  # the repository of timm's published weights
    published: tuple[Published, ...] = ()
    preprocess: ClassifierPreprocess = TIMM  # evaluation's, unless a config says otherwise


class CSPNet(nn.Module):
    """A CSP network as an ImageNet classifier and, through `forward_features`, as a detector's backbone.

    Attributes:
        channels: channels of each feature map, `{"c2": ..., ..., "c5": ...}`.
        strides: pixels of the image a cell of each map, `{"c2": 4, ..., "c5": 32}`.

    `num_classes=0` leaves the classifier out.
    """

    def __init__(self, name: str, variant: Variant, num_classes: int):
        super().__init__()
        self.name, self.variant, self.num_classes = name, variant, num_classes
        stem = variant.stem
        self.stem = nn.Sequential()
        self.stem.add_module("conv1", ConvNormAct(3, stem.channels, stem.kernel, min(stem.stride, 2)))
        if stem.stride == 4:
            self.stem.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))

        self.stages = nn.Sequential()
        self.channels: dict[str, int] = {}
        self.strides: dict[str, int] = {}
        cin, total = stem.channels, stem.stride
        for i, (depth, cout, stride) in enumerate(zip(variant.depths, variant.channels, variant.strides, strict=True)):
            width = round(cout * variant.expand[i]) // 2
            stage = CSPStage(
                variant.block, cin, cout, stride, depth, width, variant.bottleneck[i],
                variant.groups, variant.grow_first, variant.linear_expand,
            )  # fmt: skip
            self.stages.append(stage)
            cin, total = cout, total * stride
            if total >= 4:  # C1 is of no use to a neck
                level = f"c{total.bit_length() - 1}"
                self.channels[level], self.strides[level] = cout, total

        self.head = Head(cin, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, num_classes]."""
        return self.head(self.stages(self.stem(x)))

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised images [N, 3, H, W] to maps `{"c2": [N, C2, H/4, W/4], ..., "c5": [N, C5, H/32, W/32]}`."""
        features, total = {}, self.variant.stem.stride
        x = self.stem(x)
        for stage, stride in zip(self.stages, self.variant.strides, strict=True):
            x = stage(x)
            total *= stride
            if total >= 4:
                features[f"c{total.bit_length() - 1}"] = x
        return features


def _mmpretrain(crop: int, top1: float, top5: float) -> Published:
    resize = {256: 288, 224: 256}[crop]
    return Published("mmpretrain", ClassifierPreprocess(resize=resize, crop=crop), top1, top5)


def _timm(top1: float, top5: float) -> Published:
    return Published("timm", TIMM, top1, top5)


_RESNET = Variant(
    block=Bottleneck,
    stem=Stem(channels=64, kernel=7, stride=4),
    depths=(3, 3, 5, 2),
    channels=(128, 256, 512, 1024),
    strides=(1, 2, 2, 2),
    expand=(2, 2, 2, 2),
    bottleneck=(0.5, 0.5, 0.5, 0.5),
    linear_expand=True,
)
_RESNEXT = replace(_RESNET, channels=(256, 512, 1024, 2048), expand=(1,) * 4, bottleneck=(1,) * 4, groups=32)
_DARKNET = Variant(
    block=DarkBlock,
    stem=Stem(channels=32, kernel=3, stride=1),
    depths=(1, 2, 8, 8, 4),
    channels=(64, 128, 256, 512, 1024),
    strides=(2, 2, 2, 2, 2),
    expand=(2, 1, 1, 1, 1),
    bottleneck=(0.5, 1, 1, 1, 1),
    grow_first=True,
)

VARIANTS: dict[str, Variant] = {
    "cspresnet50": replace(
        _RESNET,
        hub="timm/cspresnet50.ra_in1k",
        published=(_timm(79.578, 94.698), _mmpretrain(256, 79.55, 94.68)),
    ),
    "cspresnext50": replace(
        _RESNEXT,
        hub="timm/cspresnext50.ra_in1k",
        published=(_timm(80.548, 95.330), _mmpretrain(224, 79.96, 94.96)),
    ),
    "cspdarknet50": replace(
        _DARKNET,
        hub="timm/cspdarknet53.ra_in1k",
        published=(_timm(80.078, 95.060), _mmpretrain(256, 80.05, 95.07)),
    ),
    # Small ones, ours, for tests, the quickstart and laptops; nobody published weights of them.
    "cspresnet10": replace(
        _RESNET, stem=Stem(32, 7, 4), depths=(1, 1, 1, 1), channels=(64, 128, 256, 512), expand=(1,) * 4
    ),
    "cspresnext10": replace(_RESNEXT, stem=Stem(32, 7, 4), depths=(1, 1, 1, 1), channels=(64, 128, 256, 512), groups=8),
    "cspdarknet10": replace(_DARKNET, stem=Stem(16, 3, 1), depths=(1, 1, 1, 1, 1), channels=(32, 64, 128, 256, 512)),
}
ALIASES = {"cspdarknet53": "cspdarknet50"}  # timm's and the authors' name counts the convolutions


def get_variant(name: str) -> tuple[str, Variant]:
    """The table's name and row for a name or alias.

    Raises:
        InputError: no such name; the nearest one is named.
    """
    name = ALIASES.get(name, name)
    if name not in VARIANTS:
        raise unknown("model", name, [*VARIANTS, *ALIASES])
    return name, VARIANTS[name]


def create_model(
    name: str, num_classes: int = 1000, weights: str | Path | None = None, *, ignore_head: bool = False
) -> CSPNet:
    """Build a network of the table; `weights` is a source that `weights.load_weights` reads.

    Raises:
        InputError: unknown name, or weights that do not fit.
    """
    name, variant = get_variant(name)
    model = CSPNet(name, variant, num_classes)
    if weights is not None:
        load_weights(model, weights, ignore_head=ignore_head)
    return model
