"""Random networks that find something, as weights; conftest.py's `exported` makes artefacts of them."""

from pathlib import Path

import torch
from test_backbones_cspnet import randomize

from backbones.cspnet import create_model
from backbones.preprocess import ClassifierPreprocess, DetectorPreprocess
from backbones.weights import save_weights
from detection.models import build_detector
from detection.spec import DetectorSpec

# Every head once, as an export takes long; benchmarks.sweep has every kind.
FAMILIES = ("fcos", "retinanet", "fasterrcnn_v2", "maskrcnn")
CROP = ClassifierPreprocess(resize=40, crop=32)
SIZE = DetectorPreprocess(min_size=96, max_size=128)


def classifier_weights(path: Path, name: str = "cspresnet10") -> Path:
    model = randomize(create_model(name, 3))
    classes = {"classes": ["circle", "cross", "square"], "preprocess": CROP.model_dump(), "config": {"seed": 7}}
    save_weights(path, model, {"task": "classification", "model": name, **classes})
    return path


def detector_weights(path: Path, family: str = "fcos") -> Path:
    """Random weights, with heads that find objects everywhere.

    Args:
        family: such as `fcos`, or `maskrcnn_v2` for its second version.
    """
    name = f"{family.removesuffix('_v2')}_cspresnet10_fpn{'_v2' if family.endswith('_v2') else ''}"
    spec = DetectorSpec(
        model=name, num_classes=3, levels=("c4", "c5"), fpn_channels=64, score_threshold=0.2, max_detections=30
    )  # of few levels: the exporter traces the heads once a level
    model = randomize(build_detector(spec, SIZE))
    for name, parameter in model.named_parameters():
        if "cls_score" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "classification_head.cls_logits" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        if "classification_head.cls_logits.bias" in name:  # of (anchor, class): training makes background rare
            parameter.data.view(-1, spec.num_classes)[:, 0] = -10
    metadata = {"task": "detection", "model": spec.model, "detector": spec.model_dump(), "classes": ["cat", "dog"]}
    metadata |= {"category_ids": [5, 90], "preprocess": SIZE.model_dump(), "config": {}}
    save_weights(path, model, metadata)
    return path
