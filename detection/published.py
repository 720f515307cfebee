"""What torchvision published: detectors over its ResNet-50, trained on COCO, with their weights and figures."""

import re
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, WeightsEnum
from torchvision.models import detection as tv
from torchvision.ops import FrozenBatchNorm2d

from backbones.errors import InputError
from backbones.files import sha256
from backbones.weights import read_weights, resolve

TORCHVISION = "torchvision"  # in a path's place: the weights that torchvision published
RESNET50 = "resnet50"

WEIGHTS: dict[str, WeightsEnum] = {
    "fasterrcnn_resnet50_fpn": tv.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    "fasterrcnn_resnet50_fpn_v2": tv.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    "retinanet_resnet50_fpn": tv.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
    "retinanet_resnet50_fpn_v2": tv.RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
    "fcos_resnet50_fpn": tv.FCOS_ResNet50_FPN_Weights.COCO_V1,
    "maskrcnn_resnet50_fpn": tv.MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
    "maskrcnn_resnet50_fpn_v2": tv.MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
}
# They learnt while FrozenBatchNorm2d added no eps to the variance; torchvision sets it to 0 for them alone.
WITHOUT_EPS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn")


def figures(name: str) -> dict[str, float]:
    """AP in percent on COCO val2017 as torchvision states it: `box_map`, and `mask_map` of a Mask R-CNN."""
    found: dict[str, float] = WEIGHTS[name].meta["_metrics"]["COCO-val2017"]
    return dict(found)


def categories() -> tuple[tuple[int, ...], tuple[str, ...]]:
    """COCO's ids 1...90 and their names. A label is its id; the ten ids that COCO never used are called N/A."""
    names = WEIGHTS["fcos_resnet50_fpn"].meta["categories"][1:]  # without the background
    return tuple(range(1, len(names) + 1)), tuple(names)


def fetch(name: str) -> dict[str, Tensor]:
    """torchvision's weights of a detector, downloaded once to torch.hub's cache, its hash checked.

    Raises:
        InputError: it has none of this name, or there is no way to it.
    """
    if name not in WEIGHTS:
        raise InputError(f"torchvision has no weights of {name}, only of {', '.join(WEIGHTS)}: give a path")
    return _download(WEIGHTS[name])


def resnet50_weights(source: str | Path) -> dict[str, Tensor]:
    """ResNet-50 without its classifier: of a file in torchvision's layout, or `torchvision` for the ImageNet weights
    that its detectors start from.

    Raises:
        InputError: nothing there.
    """
    if source == TORCHVISION:
        state = _download(ResNet50_Weights.IMAGENET1K_V1)
    else:
        state = read_weights(resolve(source, RESNET50))[0]
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def _download(weights: WeightsEnum) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        return state
    except (URLError, OSError, RuntimeError) as error:  # the last of a wrong hash
        raise InputError(f"cannot download {weights.url} ({error}): fetch it elsewhere and give its path") from None


def is_published(name: str, path: Path) -> bool:
    """Whether a file is the one that torchvision published of a detector, by the hash that it carries in its name."""
    if name not in WEIGHTS:
        return False
    match = re.search(r"-([0-9a-f]+)\.pth$", WEIGHTS[name].url)
    assert match is not None
    return sha256(path).startswith(match[1])


def fold_statistics(model: nn.Module) -> None:
    """Rewrite norms, whose weights assume eps=0, so that with their own eps they compute the same.

    A flag beside the weights would have to be carried through every checkpoint instead.
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d | nn.SyncBatchNorm):
                assert module.running_var is not None
                module.weight *= ((module.running_var + module.eps) / module.running_var).sqrt()
