"""From a backbone's maps to the pyramid that the heads see: torchvision's FPN, or the paper's Exact Fusion Model.

Shapes: N images, C channels of a backbone's map, D of the pyramid's, h x w cells of a level.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from backbones.cspnet import CSPNet
from detection.config import ExtraLevels
from detection.names import Neck

EXTRA_LEVELS = {"none": 0, "pool": 1, "p6p7": 2}  # how many they are

NormLayer = Callable[[int], nn.Module]


class ResNet50(IntermediateLayerGetter):
    """torchvision's ResNet-50, under its parameter names, with the features of a CSPNet.

    Attributes:
        channels: channels of each feature map, as CSPNet's; `strides` likewise.

    Args:
        frozen: keep everything up to this level as it is, as CSPNet does.
    """

    def __init__(self, levels: Sequence[str], frozen: str | None = None):
        super().__init__(resnet50(weights=None), {f"layer{int(level[1]) - 1}": level for level in levels})
        self.channels = {level: 64 << int(level[1]) for level in levels}
        self.strides = {level: 1 << int(level[1]) for level in levels}
        modules = list(self.values())
        self._frozen_until = {None: 0, "stem": 4}.get(frozen) if frozen in (None, "stem") else 3 + int(frozen[1])
        for module in modules[: self._frozen_until]:
            module.requires_grad_(False)
        self.train()

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised images [N, 3, H, W] to maps `{"c2": [N, 256, H/4, W/4], ...}`."""
        return self(x)

    def train(self, mode: bool = True) -> "ResNet50":
        super().train(mode)
        for module in list(self.values())[: self._frozen_until]:
            module.eval()
        return self


class ExactFusion(nn.Module):
    """The Exact Fusion Model of CSPNet's paper (arXiv 1911.11929, section 3.2 and figure 6c).

    A box of the s-th scale is bounded by the scales below and above it, so that each level sees these three and no
    other: the map of s itself, of s - 1 shrunk and of s + 1 grown to its size, concatenated. The lowest and the highest
    level see two. Before the concatenation Maxout (Goodfellow et al., arXiv 1302.4389) compresses every map to D
    channels: the larger of two linear maps.

        c(s-1) -> maxout -> max-pool 2 --+
        c(s)   -> maxout ----------------+-> concat -> 1x1, LeakyReLU -> 3x3 -> p(s)
        c(s+1) -> maxout -> nearest x2 --+

    The authors published no config of it. What the paper leaves open is ours: Maxout's two 1x1 convolutions, where
    Darknet's `maxpool_depth` takes the maximum over groups of the channels as they are; the way a map changes its size;
    the 1x1 convolution after the concatenation; levels above the backbone's, which are the FPN's; and heads that are
    torchvision's, where the paper has YOLOv3's with one anchor an object.

    Args:
        channels: of each level's map, the finest first.
        out_channels: D.
        norm_layer: after each convolution; None for a bias instead.
    """

    def __init__(
        self, channels: Sequence[int], out_channels: int, extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: NormLayer | None = None,
    ):  # fmt: skip
        super().__init__()

        def conv(cin: int, cout: int, kernel: int, act: Callable[..., nn.Module] | None = None) -> nn.Module:
            return Conv2dNormActivation(cin, cout, kernel, norm_layer=norm_layer, activation_layer=act)

        top = len(channels) - 1
        scales = [min(i + 1, top) - max(i - 1, 0) + 1 for i in range(len(channels))]
        self.pieces = nn.ModuleList(conv(c, 2 * out_channels, 1) for c in channels)
        self.fuse_blocks = nn.ModuleList(conv(n * out_channels, out_channels, 1, nn.LeakyReLU) for n in scales)
        self.layer_blocks = nn.ModuleList(conv(out_channels, out_channels, 3) for _ in channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision's FPN
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.extra_blocks = extra_blocks

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Maps [N, C, h, w], the finest first, to as many [N, D, h, w] under the same names, and the extra ones."""
        maps = [pieces(c).unflatten(1, (2, -1)).amax(1) for pieces, c in zip(self.pieces, x.values(), strict=True)]
        names, results = list(x), []
        for i, own in enumerate(maps):
            near = [F.max_pool2d(maps[i - 1], 3, 2, 1)] if i else []
            near.append(own)
            if i + 1 < len(maps):
                near.append(F.interpolate(maps[i + 1], size=own.shape[-2:], mode="nearest"))
            results.append(self.layer_blocks[i](self.fuse_blocks[i](torch.cat(near, 1))))
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, list(x.values()), names)
        return dict(zip(names, results, strict=True))


class BackboneWithNeck(nn.Module):
    """Images [N, 3, H, W] -> `{"c3": [N, D, H/8, W/8], ...}`, with the extra levels last.

    Attributes:
        strides: pixels a cell of each level, in order.

    Args:
        levels: the backbone's maps that the neck takes: some of c2...c5 that follow each other.
        out_channels: D.
        extra_levels: above them: `pool`, every other cell of the highest; `p6p7`, two strided convolutions.
        norm_layer: in the neck; None for a bias instead.
        extra_from_body: the strided convolutions start from the backbone's highest map, not from the neck's.
    """

    def __init__(
        self, body: CSPNet | ResNet50, levels: Sequence[str], out_channels: int, extra_levels: ExtraLevels,
        neck: Neck = "fpn", norm_layer: NormLayer | None = None, extra_from_body: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.body, self.levels, self.out_channels = body, tuple(levels), out_channels
        extra: ExtraFPNBlock | None = LastLevelMaxPool() if extra_levels == "pool" else None
        if extra_levels == "p6p7":
            extra = LastLevelP6P7(body.channels[levels[-1]] if extra_from_body else out_channels, out_channels)
            extra.use_P5 = not extra_from_body  # it guesses, wrongly where both have the same channels
        build = FeaturePyramidNetwork if neck == "fpn" else ExactFusion
        self.fpn = build([body.channels[level] for level in levels], out_channels, extra, norm_layer)
        strides = [body.strides[level] for level in levels]
        self.strides = strides + [strides[-1] << (i + 1) for i in range(EXTRA_LEVELS[extra_levels])]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body.forward_features(x)
        pyramid: dict[str, Tensor] = self.fpn({level: features[level] for level in self.levels})
        return pyramid
