"""BatchedDetector finds what torchvision finds, alone or in a batch; test_serving_parity.py asks it of artefacts.

Canvases are multiples of 128, as in serving: the stride of P7 divides them.
"""

import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, batched_nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from backbones.errors import InputError
from backbones.preprocess import DetectorPreprocess
from detection.batched import BatchedDetector, output_names
from detection.models import create_detector
from detection.onnx_ops import REJECTED, nms_keep, translation_table
from detection.region_heads import RoIPool

CHANNELS = 64
NUM_CLASSES = 6
FAMILIES = ["retinanet", "fcos", "fasterrcnn", "maskrcnn"]
ONE_STAGE = ("retinanet", "fcos")


class TinyBackbone(nn.Module):
    """Convolutions of stride 8 and 16 and an FPN: P3-P5, or P3, P4, P6, P7 for one stage."""

    def __init__(self, one_stage: bool) -> None:
        super().__init__()
        strides = (8, 2)
        inputs = (3, CHANNELS)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, CHANNELS, 3 if s == 2 else 11, s, 1 if s == 2 else 5), nn.ReLU())
            for c, s in zip(inputs, strides, strict=True)
        )
        extra = LastLevelP6P7(CHANNELS, CHANNELS) if one_stage else LastLevelMaxPool()
        self.fpn = FeaturePyramidNetwork([CHANNELS] * len(strides), CHANNELS, extra)
        self.out_channels = CHANNELS

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = OrderedDict()
        for i, stage in enumerate(self.stages):
            x = stage(x)
            maps[str(i)] = x
        return self.fpn(maps)


def build(family: str, **settings: float) -> nn.Module:
    """A small detector whose random weights make detections abound, in boxes like its anchors."""
    torch.manual_seed(0)
    backbone = TinyBackbone(one_stage=family in ONE_STAGE)
    model: nn.Module
    if family not in ONE_STAGE:
        settings = {"rpn_pre_nms_top_n_test": 200, "rpn_post_nms_top_n_test": 150} | settings
        anchors = AnchorGenerator(((32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 3)
        pools = {"box_roi_pool": roi_pool(7)} | ({"mask_roi_pool": roi_pool(14)} if family == "maskrcnn" else {})
        model = (MaskRCNN if family == "maskrcnn" else FasterRCNN)(
            backbone, NUM_CLASSES, size_divisible=128, rpn_anchor_generator=anchors, **pools, **settings
        )
        if family == "maskrcnn":  # torchvision's own would take most of the time
            model.roi_heads.mask_head = MaskRCNNHeads(CHANNELS, [16], 1)
            model.roi_heads.mask_predictor = MaskRCNNPredictor(16, 16, NUM_CLASSES)
    elif family == "fcos":
        settings = {"topk_candidates": 200, "score_thresh": 0.3} | settings
        anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
        model = FCOS(backbone, NUM_CLASSES, size_divisible=128, anchor_generator=anchors, **settings)
    else:
        settings = {"topk_candidates": 200, "score_thresh": 0.3} | settings
        sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (16, 32, 64, 128))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 4)
        model = RetinaNet(backbone, NUM_CLASSES, anchor_generator=anchors, size_divisible=128, **settings)
    excite(model)
    # torchvision's _skip_resize counts in training only; here images come resized in both modes.
    model.transform.resize = lambda image, target: (image, target)  # type: ignore
    # Masks stay as the network gives them, before they are pasted into the image.
    model.transform.postprocess = lambda result, *_: result  # type: ignore
    return model.eval()


def roi_pool(size: int) -> MultiScaleRoIAlign:
    pool = MultiScaleRoIAlign(["0", "1"], size, 2)
    pool.scales, pool.map_levels = [1 / 8, 1 / 16], initLevelMapper(3, 4)
    return pool


def excite(model: nn.Module) -> None:
    """Random weights that make boxes abound: neither all alike, nor their anchors, whose IoU is often the threshold."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if "bbox" in name and not isinstance(model, FCOS):
                module.weight.data *= 0.2
            if "cls" in name:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
                module.weight.data *= 1.0 if isinstance(model, FCOS) else 0.3  # saturated scores tie


def batch(*sizes: tuple[int, int], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Images of blots in the corner of a canvas; the rest of it is filled, and must not matter."""
    generator = torch.Generator().manual_seed(1)
    images = torch.full((len(sizes), *canvas, 3), 99, dtype=torch.uint8)
    for image, (h, w) in zip(images, sizes, strict=True):
        blots = torch.rand(1, 3, 16, 16, generator=generator) * 255
        image[:h, :w] = interpolate(blots, (h, w), mode="bilinear")[0].permute(1, 2, 0).byte()
    return images, torch.tensor(sizes)


MIXED = batch((100, 230), (128, 256), (77, 140), canvas=(128, 256))
ALONE = batch((100, 230), canvas=(128, 256))
PORTRAIT = batch((250, 100), (256, 128), (60, 90), canvas=(256, 128))
SQUARE = batch((300, 384), (384, 200), canvas=(384, 384))
SMALLEST = batch((128, 100), canvas=(128, 128))


def detect(detector: nn.Module, images: Tensor, sizes: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return [x.numpy() for x in detector(images, sizes)]


def detect_torchvision(model: nn.Module, images: Tensor, sizes: Tensor) -> list[list[np.ndarray]]:
    """Boxes, scores, labels and, of a Mask R-CNN, masks [K,28,28] of each image."""
    crops = [x[:h, :w].permute(2, 0, 1).float() / 255 for x, (h, w) in zip(images, sizes, strict=True)]
    with torch.no_grad():
        found = model(crops)
    keys = ("boxes", "scores", "labels", *(["masks"] if isinstance(model, MaskRCNN) else []))
    return [[(x[key][:, 0] if key == "masks" else x[key]).numpy() for key in keys] for x in found]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Boxes, scores, labels and masks of one image: the same set, where near-ties may change places."""
    close = (
        (np.abs(found[0][:, None] - expected[0]).max(-1) < 1e-2)
        & (np.abs(found[1][:, None] - expected[1]) < 1e-4)
        & (found[2][:, None] == expected[2])
    )
    assert len(found[1]) == len(expected[1])
    assert close.any(0).all() and close.any(1).all()
    assert len(found) == len(expected)
    if len(found) > 3:
        np.testing.assert_allclose(found[3], expected[3][close.argmax(1)], atol=1e-3)


def unpad(outputs: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Boxes, scores, labels and masks of each image, after a look at their order and padding."""
    boxes, scores, labels, counts, *masks = outputs
    assert (boxes.dtype, scores.dtype) == (np.float32, np.float32)
    assert (labels.dtype, counts.dtype) == (np.int64, np.int64)
    for i, n in enumerate(counts):
        assert (np.diff(scores[i]) <= 0).all()
        assert not boxes[i, n:].any() and not scores[i, n:].any() and not labels[i, n:].any()
        assert not any(x[i, n:].any() for x in masks)
    return [[x[i, :n] for x in (boxes, scores, labels, *masks)] for i, n in enumerate(counts)]


@pytest.mark.parametrize("inputs", [ALONE, MIXED, PORTRAIT], ids=["alone", "mixed", "portrait"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_detections_as_torchvision(family: str, inputs: tuple[Tensor, Tensor]) -> None:
    model = build(family)
    found = unpad(detect(BatchedDetector(model), *inputs))
    for ours, theirs in zip(found, detect_torchvision(model, *inputs), strict=True):
        assert len(theirs[1]) > 20
        assert_same(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_levels_with_fewer_anchors_than_top_k(family: str) -> None:
    """Every level has fewer, and all of them together have fewer than are to be returned."""
    settings = {"topk_candidates": 5000, "detections_per_img": 9000, "score_thresh": 0.5}
    if family not in ONE_STAGE:
        settings = {
            "rpn_pre_nms_top_n_test": 5000,
            "rpn_post_nms_top_n_test": 6000,
            "box_score_thresh": 0.5,
        }
    model = build(family, **settings)
    (ours,) = unpad(detect(BatchedDetector(model), *SMALLEST))
    (theirs,) = detect_torchvision(model, *SMALLEST)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("retinanet", {"score_thresh": 1.0}),
        ("fcos", {"score_thresh": 1.0}),
        ("fasterrcnn", {"box_score_thresh": 1.0}),
        ("fasterrcnn", {"rpn_score_thresh": 1.1}),
        ("maskrcnn", {"box_score_thresh": 1.0}),
    ],
)
def test_nothing_found(family: str, settings: dict[str, float]) -> None:
    outputs = detect(BatchedDetector(build(family, **settings)), *MIXED)
    assert outputs[0].shape == (3, 300 if family == "retinanet" else 100, 4)
    assert not any(x.any() for x in outputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_alone_and_in_a_batch(family: str) -> None:
    """PyTorch's CPU convolutions depend on the batch size in their last bits, so nearly equal."""
    detector = BatchedDetector(build(family))
    together = detect(detector, *MIXED)
    for i in range(3):
        alone = detect(detector, *(x[i : i + 1] for x in MIXED))
        for a, b in zip(alone, together, strict=True):
            np.testing.assert_allclose(a[0], b[i], rtol=1e-5, atol=1e-3)


NAMES = [
    "fasterrcnn_cspresnet10_fpn_v2", "fasterrcnn_cspresnet10_efm_v2", "retinanet_cspresnet10_fpn_v2",
    "retinanet_cspresnet10_efm", "fcos_cspresnet10_efm", "fasterrcnn_cspresnet10_efm", "maskrcnn_cspresnet10_fpn_v2",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_second_versions_and_necks(name: str) -> None:
    preprocess = DetectorPreprocess(min_size=128, max_size=256)
    model = create_detector(name, NUM_CLASSES, fpn_channels=64, score_threshold=0.3, preprocess=preprocess).eval()
    excite(model)
    if isinstance(model, FasterRCNN):
        model.rpn._pre_nms_top_n["testing"], model.rpn._post_nms_top_n["testing"] = 200, 100
    else:
        model.topk_candidates = 100
    found = unpad(detect(BatchedDetector(model), *MIXED))
    for ours, theirs in zip(found, detect_torchvision(model, *MIXED), strict=True):
        assert len(theirs[1]) > 20
        assert_same(ours, theirs)


def test_the_model_is_left_alone() -> None:
    model = build("fasterrcnn").train()
    detector = BatchedDetector(model)
    assert all(x.training for x in model.modules())
    assert all(x.requires_grad for x in model.parameters())
    before = detect(detector, *ALONE)
    with torch.no_grad():
        for x in model.parameters():
            x.zero_()
    for a, b in zip(detect(detector, *ALONE), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_detectors_are_refused() -> None:
    with pytest.raises(InputError, match="KeypointRCNN.*supported are.*MaskRCNN"):
        BatchedDetector(KeypointRCNN(TinyBackbone(one_stage=False), 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_output_names(family: str) -> None:
    model = build(family)
    for nms in (True, False):
        assert len(output_names(model, nms)) == len(detect(BatchedDetector(model, nms), *ALONE))


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_heads_hold_the_detections(family: str) -> None:
    """NMS in each class over all of them chooses what the detector returns."""
    model = build(family, **({"topk_candidates": 10**5} if family in ONE_STAGE else {}))
    boxes, scores = detect(BatchedDetector(model, nms=False), *MIXED)
    expected = unpad(detect(BatchedDetector(model), *MIXED))
    heads = model if family in ONE_STAGE else model.roi_heads
    assert boxes.dtype == scores.dtype == np.float32
    if family not in ONE_STAGE:
        assert boxes.shape == (3, 150, NUM_CLASSES - 1, 4) and scores.shape == (3, 150, NUM_CLASSES - 1)
    for i in range(3):
        row, label = np.nonzero(scores[i] > heads.score_thresh)
        found = boxes[i, row] if family in ONE_STAGE else boxes[i, row, label]
        chosen = [found, scores[i, row, label], label if family in ONE_STAGE else label + 1]
        keep = batched_nms(*map(torch.from_numpy, chosen), heads.nms_thresh)[: heads.detections_per_img]
        assert_same([x[keep] for x in chosen], expected[i][:3])


def test_levels_of_regions_are_torchvisions() -> None:
    """Found with limits instead of a logarithm: at powers of two, beside them and anywhere."""
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 1, 2)
    pool.scales, pool.map_levels = [1 / 4, 1 / 8, 1 / 16, 1 / 32], initLevelMapper(2, 5)
    sides = torch.cat((7 * 2.0 ** torch.arange(8), torch.rand(2000) * 900 + 1))
    sides = torch.cat((sides, sides * (1 + 2e-6), sides * (1 - 2e-6), torch.zeros(1)))
    boxes = torch.stack((sides * 0, sides * 0, sides, sides), 1)  # [R,4]
    features = {str(i): torch.full((1, 1, 256 >> i, 256 >> i), float(i)) for i in range(4)}
    pooled, rows = RoIPool(pool)(features, boxes[None], torch.ones(1, len(boxes), dtype=torch.bool))
    assert rows.sort()[0].equal(torch.arange(len(boxes)))
    levels = pool.map_levels([boxes])  # [R]
    assert levels.unique().tolist() == [0, 1, 2, 3]
    assert pooled.flatten().round().long().equal(levels[rows])


class NMS(nn.Module):
    def forward(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return nms_keep(boxes, scores, 0.5, 3, labels, 2), nms_keep(boxes, scores, 0.5, 3)


def test_nms_in_onnx_equals_eager(tmp_path: Path) -> None:
    """IoU is suppressed above 0.5 and not at it, classes apart, rejected rows never, at most 3."""
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 6], [20, 0, 30, 10]]).float()
    boxes = torch.cat((boxes, boxes + 40)).repeat(2, 1, 1)  # [2,8,4]
    scores = torch.tensor([0.9, 0.8, 0.7, 0.0] * 2).repeat(2, 1)  # [2,8]
    scores[1, 0] = REJECTED
    labels = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 1]] * 2)
    path = tmp_path / "nms.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.onnx.export(
            NMS().eval(), (boxes, scores, labels), path, dynamo=True, external_data=False, verbose=False,
            custom_translation_table=translation_table(),
        )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    alone = [[1, 1, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1, 0, 0]]
    by_class = [[1, 1, 1, 0, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1, 0, 1]]
    for s, expected in ((scores, (by_class, alone)), (scores * 0 + REJECTED, ([[0] * 8] * 2,) * 2)):
        found = session.run(None, {"boxes": boxes.numpy(), "scores": s.numpy(), "labels": labels.numpy()})
        for eager, onnx_, rows in zip(NMS()(boxes, s, labels), found, expected, strict=True):
            np.testing.assert_array_equal(eager, np.array(rows, dtype=bool))
            np.testing.assert_array_equal(onnx_, np.array(rows, dtype=bool))
