"""CSPNet: one network as an ImageNet classifier and as a detector's or segmenter's backbone. Read this file first.

Paper: Wang et al., "CSPNet: A New Backbone that can Enhance Learning Capability of CNN", arXiv 1911.11929.
A network is a stem, stages and a head. `variants.py` is the table of networks, `stages.py` has the split and the
join that the paper is about, `blocks.py` what lies between them, `dense.py` the DenseNet side.

Shapes: N images, C channels, H x W pixels; a map cK has stride 2^K, unless `output_stride` keeps it larger.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar, get_args

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from backbones.dense import DenseVariant
from backbones.errors import InputError, unknown
from backbones.published import ALIASES, PLAIN, without_alias
from backbones.stages import Resolution
from backbones.variants import VARIANTS, Variant
from backbones.weights import load_weights, read_weights, resolve

LEVELS = ("c1", "c2", "c3", "c4", "c5")

BatchNorm = Literal["batch", "frozen", "sync", "group"]
Network = TypeVar("Network", bound=nn.Module)


class Head(nn.Module):
    """Average over the map, then a linear layer: [N, C, H, W] -> [N, num_classes]; without classes [N, C]."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class CSPNet(nn.Module):
    """A CSP network, or its plain twin, from a row of the table.

    Attributes:
        channels: channels of each feature map, `{"c2": ..., ..., "c5": ...}`.
        strides: pixels of the image a cell of each map, `{"c2": 4, ..., "c5": 32}`.

    Args:
        num_classes: 0 leaves the classifier out, and the stages above the highest of `levels`.
        levels: the maps that `forward_features` gives, some of c1...c5.
        output_stride: 8, 16 or 32; from there on convolutions are dilated instead of strided.
        drop_path: rate of the last block; the others' rise to it linearly (Huang et al., arXiv 1603.09382).
        frozen: keep everything up to this level, such as c2, or the `stem`, as it is: no gradients, BatchNorm in
            evaluation mode.
        checkpointing: keep only the blocks' inputs for the backward pass and compute the rest again.

    Raises:
        InputError: unknown levels or another output stride.
    """

    def __init__(
        self, name: str, variant: Variant | DenseVariant, num_classes: int, *, levels: Sequence[str] = LEVELS[1:],
        output_stride: int = 32, drop_path: float = 0.0, frozen: str | None = None, checkpointing: bool = False,
    ):  # fmt: skip
        super().__init__()
        for level in (*levels, *({frozen} - {None, "stem"})):
            if level not in LEVELS:
                raise unknown("feature level", level, LEVELS)
        if output_stride not in (8, 16, 32) or not levels:
            raise InputError(
                f"output_stride={output_stride}, levels={list(levels)}: give 8, 16 or 32, and some of c1…c5"
            )
        self.name, self.variant, self.num_classes = name, variant, num_classes
        self.levels = tuple(level for level in LEVELS if level in levels)

        self.stem = variant.build_stem()
        self.stages = nn.Sequential()
        # Where in stem and stages, one after the other, the last module of each level stands.
        taps: dict[str, tuple[int, int, int]] = {}  # index, channels, stride
        cin, stride, nominal = variant.stem_channels, variant.stem_stride, variant.stem_stride
        if stride > 1:
            taps["c1"] = (len(self.stem) - (2 if stride == 4 else 1), cin, 2)  # before what takes the stem to 4
        total = sum(variant.depths)
        rates = iter([drop_path * block / max(1, total - 1) for block in range(total)])
        dilation = 1
        for i, (cout, wanted) in enumerate(zip(variant.channels, variant.strides, strict=True)):
            if num_classes == 0 and self.levels[-1] in taps:
                break
            at = _resolution(wanted, stride, output_stride, dilation)
            stride, nominal, dilation = stride * at.stride, nominal * wanted, at.dilation
            self.stages.append(variant.build_stage(i, cin, at, list(islice(rates, variant.depths[i]))))
            cin = cout
            taps[f"c{nominal.bit_length() - 1}"] = (len(self.stem) + i, cout, stride)
        if frozen not in (None, "stem", *taps):
            raise InputError(
                f"frozen={frozen} is above the highest of the levels {list(self.levels)}: give one of these"
            )
        self._taps = {level: taps[level][0] for level in self.levels}
        self._frozen_until = len(self.stem) if frozen == "stem" else taps[frozen][0] + 1 if frozen else 0
        self.channels = {level: taps[level][1] for level in self.levels}
        self.strides = {level: taps[level][2] for level in self.levels}
        self.head = Head(cin, num_classes)
        self._initialise()
        self.set_checkpointing(checkpointing)
        for module in self._modules_in_order()[: self._frozen_until]:
            module.requires_grad_(False)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] to logits [N, num_classes]."""
        return self.head(self.stages(self.stem(x)))

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised images [N, 3, H, W] to maps `{"c2": [N, C2, H/4, W/4], ..., "c5": [N, C5, H/32, W/32]}`."""
        levels = {index: level for level, index in self._taps.items()}
        features = {}
        for i, module in enumerate(self._modules_in_order()[: max(levels) + 1]):
            x = module(x)
            if i in levels:
                features[levels[i]] = x
        return features

    def train(self, mode: bool = True) -> "CSPNet":
        super().train(mode)
        for module in self._modules_in_order()[: self._frozen_until]:
            module.eval()
        return self

    def set_checkpointing(self, on: bool) -> None:
        """Switch gradient checkpointing, which saves memory in training for about a third more time."""
        for stage in self.stages:
            setattr(stage, "checkpointing", on)  # noqa: B010 - torch types modules' attributes as modules

    def _modules_in_order(self) -> list[nn.Module]:
        return [*self.stem, *self.stages]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)


def _resolution(wanted: int, stride: int, output_stride: int, dilation: int) -> Resolution:
    """A stage's stride, or the dilation in its place where the maps are to be no smaller; as timm does."""
    if stride >= output_stride and wanted > 1:
        wanted, dilation = 1, dilation * wanted
    return Resolution(wanted, first=1 if dilation <= 2 else 2, dilation=dilation)


def get_variant(name: str) -> tuple[str, Variant | DenseVariant]:
    """The table's name and row for a name, an alias, or either with `_plain` for the twin without cross-stage paths.

    Raises:
        InputError: no such name, and the nearest one; or a network that is plain itself.
    """
    base = name.removesuffix(PLAIN)
    known = without_alias(base)
    if known not in VARIANTS:
        raise unknown("model", name, [*VARIANTS, *ALIASES])
    variant = VARIANTS[known]
    if base == name:
        return known, variant
    if variant.plain is None:
        raise InputError(f"{known} is plain itself, there is no {name}: leave {PLAIN} out")
    return known + PLAIN, variant.plain


def create_model(
    name: str,
    num_classes: int = 1000,
    weights: str | Path | None = None,
    *,
    ignore_head: bool = False,
    plain: bool = False,
    levels: Sequence[str] = LEVELS[1:],
    output_stride: int = 32,
    drop_path: float = 0.0,
    frozen: str | None = None,
    batchnorm: BatchNorm = "batch",
    checkpointing: bool = False,
) -> CSPNet:
    """Build a network of the table; see `CSPNet` for what is not said here.

    Args:
        weights: a source that `weights.load_weights` reads.
        ignore_head: leave the weights' classifier out.
        plain: the twin without cross-stage paths, from the same blocks.
        batchnorm: `frozen` for torchvision's FrozenBatchNorm2d, which belongs over pretrained weights: over fresh
            ones it keeps every residual block at nothing; `sync` for statistics over all processes; `group` for
            GroupNorm, which looks at one image alone.

    Raises:
        InputError: unknown name or option, or weights that do not fit.
    """
    if batchnorm not in get_args(BatchNorm):
        raise unknown("batchnorm", batchnorm, get_args(BatchNorm))
    name, variant = get_variant(name + PLAIN if plain and not name.endswith(PLAIN) else name)
    model = CSPNet(
        name, variant, num_classes, levels=levels, output_stride=output_stride, drop_path=drop_path, frozen=frozen,
        checkpointing=checkpointing,
    )  # fmt: skip
    if batchnorm == "group":  # before loading: its weights have no statistics
        model = convert_batchnorm(model, batchnorm)
    if weights is not None:
        if batchnorm == "group":
            refuse_statistics(read_weights(resolve(weights, name))[0], weights)
        load_weights(model, weights, ignore_head=ignore_head)
    return convert_batchnorm(model, batchnorm)


def refuse_statistics(state: Mapping[str, Tensor], source: object) -> None:
    """That GroupNorm is not given a network that learnt with BatchNorm.

    Raises:
        InputError: the weights hold statistics of BatchNorm.
    """
    if any(key.endswith(".running_mean") for key in state):
        raise InputError(
            f"{source} was trained with BatchNorm, whose statistics GroupNorm has no place for: give norm=frozen or "
            "norm=batch, or leave these weights out"
        )


def convert_batchnorm(network: Network, batchnorm: BatchNorm) -> Network:
    """Replace every BatchNorm2d below `network` by what `create_model` describes, with the same numbers."""
    if batchnorm == "sync":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for name, child in network.named_children() if batchnorm != "batch" else ():
        if isinstance(child, nn.BatchNorm2d):
            setattr(network, name, _frozen(child) if batchnorm == "frozen" else _grouped(child))
        else:
            convert_batchnorm(child, batchnorm)
    return network


def _frozen(norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    frozen.load_state_dict(norm.state_dict())
    return frozen


def _grouped(norm: nn.BatchNorm2d) -> nn.GroupNorm:
    """32 groups as in its paper (Wu and He, arXiv 1803.08494), or as many as divide the channels alike."""
    group = nn.GroupNorm(math.gcd(32, norm.num_features), norm.num_features, eps=norm.eps)
    group.weight, group.bias = norm.weight, norm.bias  # and whether they learn
    return group.train(norm.training)
