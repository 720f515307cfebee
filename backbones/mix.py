"""Mixup and CutMix, through torchvision: two images of a batch become one with the labels of both."""

import torch
from torch import Tensor
from torchvision.transforms import v2


class Mix:
    """Mixup (Zhang et al., arXiv 1710.09412) or CutMix (Yun et al., arXiv 1905.04899), or at random one of them.

    Args:
        mixup: alpha of the Beta distribution that an image's share is drawn from, once a batch; 0 is off.
        cutmix: likewise of CutMix.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int):
        assert mixup or cutmix, "nothing to mix by"
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self.kinds = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[n, 3, H, W] and int64 [n] -> the same shape and soft labels [n, C], each row's sum 1."""
        mixed, soft = self.kinds[int(torch.randint(len(self.kinds), ()))](images, labels)
        return mixed, soft
