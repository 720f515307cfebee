"""The blocks that stages are made of: ResNe(X)t's, DarkNet's and their kin.

Parameter names are timm's. Each block maps [N, cin, H, W] to [N, cout, H/stride, W/stride].
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import SqueezeExcitation, StochasticDepth

Activation = Callable[[], nn.Module]


def leaky_relu() -> nn.Module:
    """PyTorch's slope of 0.01, timm's choice."""
    return nn.LeakyReLU(inplace=True)


def leaky_relu_darknet() -> nn.Module:
    """Darknet's slope of 0.1, the authors' choice."""
    return nn.LeakyReLU(0.1, inplace=True)


def silu() -> nn.Module:
    return nn.SiLU(inplace=True)


class ConvNormAct(nn.Module):
    """Convolution without bias, BatchNorm, activation (`act=None` is linear); padded to keep H/stride x W/stride."""

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1,
        act: Activation | None = leaky_relu,
    ):  # fmt: skip
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.act = nn.Identity() if act is None else act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Block(nn.Module):
    """What the residual blocks share: drop-path and the shortcut.

    The shortcut has no weights. Where a block changes the resolution or the channels it is Darknet's: every
    `stride`-th pixel, added to as many channels as both sides have. `first` is the dilation of the convolution that
    strides, or would; None is that of the others. A fresh block adds nothing to its shortcut.
    """

    def __init__(self, cin: int, cout: int, stride: int, drop_path: float):
        super().__init__()
        self.shared, self.cout, self.stride = min(cin, cout), cout, stride
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def add(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """x [N, cout, H/stride, W/stride] plus `shortcut` [N, cin, H, W]."""
        x = self.drop_path(x)
        if self.stride > 1:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        if shortcut.shape[1] == self.cout:
            return x + shortcut
        return torch.cat((x[:, : self.shared] + shortcut[:, : self.shared], x[:, self.shared :]), dim=1)


def attention(channels: int, se: float | None, act: Activation) -> nn.Module:
    """Squeeze-and-excitation that squeezes to `se` of the channels, in multiples of 8; none without `se`."""
    if se is None:
        return nn.Identity()
    return SqueezeExcitation(channels, max(8, int(channels * se + 4) // 8 * 8), activation=act)


class BasicBlock(Block):
    """ResNet-10's block: 3x3, linear 3x3, sum, activation."""

    def __init__(
        self, cin: int, cout: int, hidden: int, stride: int = 1, groups: int = 1, dilation: int = 1,
        act: Activation = leaky_relu, se: float | None = None, drop_path: float = 0.0, first: int | None = None,
    ):  # fmt: skip
        super().__init__(cin, cout, stride, drop_path)
        self.conv1 = ConvNormAct(cin, hidden, 3, stride, groups, first or dilation, act)
        self.attn1 = attention(hidden, se, act)
        self.conv2 = ConvNormAct(hidden, cout, 3, 1, groups, dilation, None)
        self.act2 = act()
        nn.init.zeros_(self.conv2.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.add(self.conv2(self.attn1(self.conv1(x))), x))


class Bottleneck(Block):
    """ResNe(X)t's block: 1x1, 3x3, linear 1x1, sum, activation."""

    def __init__(
        self, cin: int, cout: int, hidden: int, stride: int = 1, groups: int = 1, dilation: int = 1,
        act: Activation = leaky_relu, se: float | None = None, drop_path: float = 0.0, first: int | None = None,
    ):  # fmt: skip
        super().__init__(cin, cout, stride, drop_path)
        self.conv1 = ConvNormAct(cin, hidden, 1, act=act)
        self.conv2 = ConvNormAct(hidden, hidden, 3, stride, groups, first or dilation, act)
        self.attn2 = attention(hidden, se, act)
        self.conv3 = ConvNormAct(hidden, cout, 1, act=None)
        self.act3 = act()
        nn.init.zeros_(self.conv3.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.act3(self.add(self.conv3(self.attn2(self.conv2(self.conv1(x)))), x))


class DarkBlock(Block):
    """DarkNet's block: 1x1, 3x3, sum, no activation after it."""

    kernels = (1, 3)

    def __init__(
        self, cin: int, cout: int, hidden: int, stride: int = 1, groups: int = 1, dilation: int = 1,
        act: Activation = leaky_relu, se: float | None = None, drop_path: float = 0.0, first: int | None = None,
    ):  # fmt: skip
        super().__init__(cin, cout, stride, drop_path)

        def conv(cin: int, cout: int, kernel: int) -> ConvNormAct:
            if kernel == 1:
                return ConvNormAct(cin, cout, 1, act=act)
            return ConvNormAct(cin, cout, kernel, stride, groups, first or dilation, act)

        self.conv1 = conv(cin, hidden, self.kernels[0])
        self.attn = attention(hidden, se, act)
        self.conv2 = conv(hidden, cout, self.kernels[1])
        nn.init.zeros_(self.conv2.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.conv2(self.attn(self.conv1(x))), x)


class EdgeBlock(DarkBlock):
    """Fused inverted bottleneck: 3x3, 1x1, sum, no activation after it."""

    kernels = (3, 1)


def run_blocks(blocks: nn.Sequential, x: Tensor, checkpointing: bool) -> Tensor:
    """The blocks in order; with `checkpointing` only their inputs are kept for the backward pass (Chen et al.,
    arXiv 1604.06174) and the rest is computed again, without counting a batch twice in BatchNorm's statistics.
    """
    if not (checkpointing and torch.is_grad_enabled()):
        return blocks(x)
    for block in blocks:
        if torch.compiler.is_compiling():  # which counts once by itself, and takes no contexts
            x = checkpoint(block, x, use_reentrant=False)
        else:
            contexts = partial(_contexts, block)
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return x


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of the first forward pass and of the second."""
    return nullcontext(), _untracked(block)


@contextmanager
def _untracked(block: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch but leaves its running statistics as they are."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
