import pytest
import torch
from torchvision.models.detection import (
    FCOS,
    FasterRCNN,
    RetinaNet,
    fasterrcnn_resnet50_fpn,
    fcos_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.ops import FrozenBatchNorm2d

from backbones.cspnet import create_model
from backbones.errors import InputError
from backbones.preprocess import DetectorPreprocess
from backbones.weights import save_weights
from detection.models import DetectorSpec, build_detector, create_detector, load_detector, thresholds

SMALL = DetectorPreprocess(min_size=128, max_size=128)
FAMILIES = {"fasterrcnn": FasterRCNN, "retinanet": RetinaNet, "fcos": FCOS}
TWINS = {"fasterrcnn": fasterrcnn_resnet50_fpn, "retinanet": retinanet_resnet50_fpn, "fcos": fcos_resnet50_fpn}


def small(family: str, backbone: str = "cspresnet10", **settings):
    return create_detector(f"{family}_{backbone}_fpn", 4, fpn_channels=64, preprocess=SMALL, **settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backbone", ["cspresnet10", "cspresnext10", "cspdarknet10"])
def test_trains_and_detects_on_images_with_and_without_objects(family, backbone):
    model = small(family, backbone).train()
    assert isinstance(model, FAMILIES[family])
    images = [torch.rand(3, 128, 96), torch.rand(3, 90, 128)]
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    targets = [{"boxes": torch.tensor([[10.0, 10, 60, 70]]), "labels": torch.tensor([3])}, empty]
    losses = model(images, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert torch.isfinite(sum(model([images[0]], [empty]).values()))
    with torch.inference_mode():
        outputs = model.eval()(images)
    assert [set(output) for output in outputs] == [{"boxes", "scores", "labels"}] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_anchors_and_settings_are_torchvisions(family):
    model = create_detector(f"{family}_cspresnet50_fpn", 91)
    twin = TWINS[family](weights=None, weights_backbone=None)
    anchors = [(m.rpn if family == "fasterrcnn" else m).anchor_generator for m in (model, twin)]
    for ours, theirs in zip(anchors[0].cell_anchors, anchors[1].cell_anchors, strict=True):
        assert torch.equal(ours, theirs)
    assert thresholds(model) == thresholds(twin)
    features = model.backbone(torch.zeros(1, 3, 256, 256))
    assert len(features) == len(anchors[0].sizes)
    for stride, feature in zip(model.backbone.strides, features.values(), strict=True):
        assert feature.shape == (1, 256, 256 // stride, 256 // stride)


def test_settings_reach_each_family():
    for family in FAMILIES:
        model = small(family, score_threshold=0.3, nms_iou=0.4, max_detections=7)
        assert thresholds(model) == {"score_threshold": 0.3, "nms_iou": 0.4, "max_detections": 7}


@torch.inference_mode()
def test_images_are_not_resized_again():
    model = small("fcos", score_threshold=0.0).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model([torch.rand(3, 100, 60)])
    assert seen == [(1, 3, 128, 128)]


def test_batchnorm_is_frozen_over_pretrained_weights_alone(tmp_path):
    weights = tmp_path / "w.pth"
    torch.save(create_model("cspresnet10", 5).state_dict(), weights)

    def frozen(**settings):
        return any(isinstance(module, FrozenBatchNorm2d) for module in small("fcos", **settings).modules())

    assert not frozen()
    assert frozen(weights_backbone=weights)
    assert not frozen(weights_backbone=weights, frozen_batchnorm=False)
    body = small("fcos", weights_backbone=weights).backbone.body
    state = torch.load(weights, weights_only=True)
    assert all(torch.equal(value, state[key]) for key, value in body.state_dict().items())


@pytest.mark.parametrize("frozen", [True, False])
@torch.inference_mode()
def test_saved_detectors_come_back(tmp_path, frozen):
    spec = DetectorSpec(model="fcos_cspresnet10_fpn", num_classes=4, fpn_channels=64, frozen_batchnorm=frozen)
    model = build_detector(spec, SMALL).eval()
    metadata = {"task": "detection", "detector": spec.model_dump(), "preprocess": SMALL.model_dump()}
    save_weights(tmp_path / "w.safetensors", model, metadata)
    again, _ = load_detector(tmp_path / "w.safetensors", score_threshold=0.01)
    assert thresholds(again)["score_threshold"] == 0.01
    again = load_detector(tmp_path / "w.safetensors")[0].eval()
    image = torch.rand(3, 128, 128)
    for key, value in model([image])[0].items():
        assert torch.equal(again([image])[0][key], value)


def test_bad_names_and_files(tmp_path):
    with pytest.raises(InputError, match="unknown detector 'fcos_cspresnet5_fpn': did you mean"):
        create_detector("fcos_cspresnet5_fpn")
    with pytest.raises(InputError, match="unknown detector 'yolo'"):
        create_detector("yolo")
    save_weights(tmp_path / "c.safetensors", create_model("cspresnet10", 2), {"model": "cspresnet10"})
    with pytest.raises(InputError, match="holds cspresnet10, no detector"):
        load_detector(tmp_path / "c.safetensors")
