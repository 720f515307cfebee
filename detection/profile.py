"""What a detector costs, counted on the meta device, without memory."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FasterRCNN

from backbones.cspnet import create_model
from backbones.preprocess import DetectorPreprocess
from detection import published
from detection.config import LEVELS
from detection.families import Detector
from detection.models import build_detector, has_masks
from detection.necks import ResNet50
from detection.published import RESNET50
from detection.spec import DetectorSpec, canonical_name, names, parse

PROPOSALS = 1000  # that a two-stage detector keeps of an image in evaluation; 512 of them are trained on
DETECTIONS = 100
PUBLISHED_MODELS = ("cspresnet50", "cspresnext50", "cspdarknet50")
SIZES = ((800, 1333), (512, 512))  # height, width
DIVISOR = 32  # of a canvas's sides, as torchvision pads and configs/coco


@dataclass(frozen=True)
class Cost:
    """Millions of weights, with those of BatchNorm; billions of multiply-adds of convolutions and linear layers for an
    image on each canvas asked for.
    """

    params: float
    gmacs: tuple[float, ...]


def profile(
    name: str, canvases: Sequence[tuple[int, int]], *, proposals: int = PROPOSALS, detections: int = DETECTIONS
) -> Cost:
    """Cost of a detector for COCO's classes on canvases of height, width in pixels.

    Args:
        proposals: regions of an image that the box head of a two-stage detector sees.
        detections: those that a Mask R-CNN's mask head sees.

    Raises:
        InputError: unknown name.
    """
    spec = DetectorSpec(model=canonical_name(name), num_classes=91)
    with torch.device("meta"):
        model = build_detector(spec, DetectorPreprocess(min_size=800, max_size=1333)).eval()
        gmacs = []
        for canvas in canvases:
            of_body, shapes = _body_cost(parse(name).backbone, canvas)
            maps = {level: torch.empty(shapes[level]) for level in model.backbone.levels}
            with FlopCounterMode(display=False) as flops:
                _neck_and_heads(model, maps, proposals, detections)
            gmacs.append((of_body + flops.get_total_flops()) / 2 / 1e9)
    return Cost(sum(parameter.numel() for parameter in model.parameters()) / 1e6, tuple(gmacs))


@torch.no_grad()
def gmacs(model: Detector, canvas: tuple[int, int]) -> float:
    """Billions of multiply-adds of a built detector for an image on a canvas of height, width in pixels, counted as
    `profile` does, with as many proposals and detections as it keeps at most.
    """
    model = copy.deepcopy(model).to("meta").eval()
    regions = model.rpn.post_nms_top_n() if isinstance(model, FasterRCNN) else 0
    detections = model.roi_heads.detections_per_img if isinstance(model, FasterRCNN) else 0
    with torch.device("meta"), FlopCounterMode(display=False) as flops:
        maps = model.backbone.body.forward_features(torch.empty(1, 3, *canvas))
        _neck_and_heads(model, maps, regions, detections)
    return flops.get_total_flops() / 2 / 1e9


@cache
@torch.no_grad()
def _body_cost(backbone: str, canvas: tuple[int, int]) -> tuple[int, dict[str, torch.Size]]:
    """FLOPs of the backbone, which all detectors over it share, and the shapes of its maps."""
    body = ResNet50(LEVELS) if backbone == RESNET50 else create_model(backbone, num_classes=0, levels=LEVELS)
    with FlopCounterMode(display=False) as flops:
        maps = body.eval().forward_features(torch.empty(1, 3, *canvas))
    return flops.get_total_flops(), {level: x.shape for level, x in maps.items()}


@torch.no_grad()
def _neck_and_heads(model: Detector, maps: dict[str, Tensor], proposals: int, detections: int) -> None:
    """The convolutions and linear layers above the backbone; what chooses boxes depends on the data, and has none."""
    levels = list(model.backbone.fpn(maps).values())
    if not isinstance(model, FasterRCNN):
        model.head(levels)
        return
    model.rpn.head(levels)
    heads, channels = model.roi_heads, model.backbone.out_channels
    heads.box_predictor(heads.box_head(torch.empty(proposals, channels, *heads.box_roi_pool.output_size)))
    if has_masks(model):
        regions = torch.empty(detections, channels, *heads.mask_roi_pool.output_size)
        heads.mask_predictor(heads.mask_head(regions))


def table(models: Sequence[str] = ()) -> Iterator[str]:
    """The lines of a table of detectors with their cost and torchvision's published AP.

    Args:
        models: none for those with an FPN over the three published CSP networks and over ResNet-50.

    Raises:
        InputError: unknown name.
    """
    chosen = models or [name for name in names([*PUBLISHED_MODELS, RESNET50]) if parse(name).neck == "fpn"]
    chosen = [canonical_name(name) for name in chosen]
    canvases = [(_padded(height), _padded(width)) for height, width in SIZES]
    yield (
        f"GMACs of convolutions and linear layers for an image of {_sizes(SIZES)} pixels on its canvas of "
        f"{_sizes(canvases)};\n91 classes; two-stage detectors with {PROPOSALS} proposals, masks of {DETECTIONS} "
        "detections, as in evaluation; AP of torchvision's weights on COCO val2017"
    )
    wide = max(map(len, chosen)) + 2
    yield f"{'':<{wide}}{'params M':>9}" + "".join(f"{f'{h}×{w}':>12}" for h, w in SIZES) + "  AP"
    for name in chosen:
        cost = profile(name, canvases)
        figures = published.figures(name) if name in published.WEIGHTS else {}
        ap = "".join(f"  {kind.removesuffix('_map')} {value:.1f}" for kind, value in figures.items())
        yield f"{name:<{wide}}{cost.params:>9.2f}" + "".join(f"{gmacs:>12.2f}" for gmacs in cost.gmacs) + ap


def _sizes(sizes: Iterable[tuple[int, int]]) -> str:
    return " or ".join(f"{height}×{width}" for height, width in sizes)


def _padded(pixels: int) -> int:
    return -(-pixels // DIVISOR) * DIVISOR
