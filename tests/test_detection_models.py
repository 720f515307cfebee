import pytest
import torch
from torch import nn
from torchvision.models import detection as tv
from torchvision.models.detection._utils import overwrite_eps
from torchvision.ops import FrozenBatchNorm2d

from backbones.config import load_config
from backbones.cspnet import create_model
from backbones.errors import InputError
from backbones.preprocess import DetectorPreprocess
from backbones.weights import save_weights
from detection import families, published
from detection.config import DetectorConfig
from detection.models import build_detector, create_detector, has_masks, thresholds
from detection.names import FAMILY_NAMES, without_alias
from detection.spec import DetectorSpec, canonical_name, names, spec_of
from detection.weights import OF_CLASSES, load_detector, start_from

SMALL = DetectorPreprocess(min_size=128, max_size=128)
CLASSES = {"fasterrcnn": tv.FasterRCNN, "retinanet": tv.RetinaNet, "fcos": tv.FCOS, "maskrcnn": tv.MaskRCNN}
CATEGORIES = {"category_ids": [2, 3, 7], "classes": ["red", "green", "blue"]}
IMAGES = [torch.rand(3, 128, 96), torch.rand(3, 90, 128)]


def small(family: str, backbone: str = "cspresnet10", neck: str = "fpn", **settings):
    return create_detector(f"{family}_{backbone}_{neck}", 4, fpn_channels=64, preprocess=SMALL, **settings)


def save(path, module, **metadata):
    known = {"task": "detection", "model": module.spec.model, "detector": module.spec.model_dump(), **CATEGORIES}
    save_weights(path, module, known | {"preprocess": SMALL.model_dump()} | metadata)
    return path


def hasten(model):
    """Fewer candidates: nothing here depends on their number."""
    if isinstance(model, tv.FasterRCNN):
        model.rpn._post_nms_top_n, model.roi_heads.batch_size_per_image = {"training": 50, "testing": 50}, 16
        model.roi_heads.detections_per_img = 10
    else:
        model.topk_candidates = 50
    return model


NAMES = [name for name in names(["cspresnet10"]) if "fcos" not in name or "fpn" in name]


@pytest.mark.parametrize("name", [*NAMES, "fcos_cspresnext10_efm", "retinanet_cspdarknet10_plain_fpn"])
def test_trains_and_detects_on_images_with_and_without_objects(name):
    model = hasten(create_detector(name, 4, fpn_channels=64, preprocess=SMALL)).train()
    assert isinstance(model, CLASSES[name.partition("_")[0]])
    one = {"boxes": torch.tensor([[10.0, 10, 60, 70]]), "labels": torch.tensor([3])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    masks = torch.ones(1, 128, 96, dtype=torch.uint8), torch.zeros(0, 90, 128, dtype=torch.uint8)
    losses = model(IMAGES, [one | {"masks": masks[0]}, none | {"masks": masks[1]}])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert ("loss_mask" in losses) == has_masks(name) == has_masks(model)
    sum(losses.values()).backward()
    assert torch.isfinite(sum(model([IMAGES[1]], [none | {"masks": masks[1]}]).values()))
    with torch.inference_mode():
        outputs = model.eval()(IMAGES)
    keys = {"boxes", "scores", "labels"} | ({"masks"} if has_masks(model) else set())
    assert [set(output) for output in outputs] == [keys] * 2


@pytest.mark.parametrize("name", published.WEIGHTS)
@torch.inference_mode()
def test_is_torchvisions_own_over_resnet50(name):
    """The same keys, and on the same weights and pixels the same boxes, scores, labels and masks."""
    twin = getattr(tv, name)(weights=None, weights_backbone=None, num_classes=5)
    with torch.device("meta"):
        model = create_detector(name, 5, preprocess=SMALL)
    assert thresholds(model) == thresholds(twin)
    if name.startswith("retinanet"):
        assert model.head.regression_head._loss_type == twin.head.regression_head._loss_type
    model.load_state_dict(twin.state_dict(), assign=True)
    for detector in (model, twin):
        hasten(detector).eval()
        at = detector.roi_heads if isinstance(detector, tv.FasterRCNN) else detector
        at.score_thresh = 0.0
    twin.transform = model.transform
    for ours, theirs in zip(model(IMAGES), twin(IMAGES), strict=True):
        assert ours.keys() == theirs.keys() and len(theirs["boxes"]) > 5
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-4)
        assert "masks" not in ours or ours["masks"].shape == (len(ours["boxes"]), 1, 28, 28)


@pytest.fixture(scope="module")
def twin():
    """torchvision's own, with running statistics that eps matters to."""
    model = tv.retinanet_resnet50_fpn(weights=None, weights_backbone=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(1e-4, 2e-3)
            module.weight.data.uniform_(0.01, 0.03)
    return model


def old_spelling(state):
    """The parameter names of a file from before torchvision 0.14."""
    moved = (".inner_blocks.", ".layer_blocks.")
    return {key.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if any(m in key for m in moved) else key: v
            for key, v in state.items()}  # fmt: skip


@torch.inference_mode()
def test_published_weights_come_with_coco_and_without_eps(tmp_path, monkeypatch, twin):
    name = "retinanet_resnet50_fpn"
    path = tmp_path / "w.pth"
    torch.save(old_spelling(twin.state_dict()), path)
    model, metadata = load_detector(path, SMALL, model=name, score_threshold=0.0)
    assert "published" not in metadata  # somebody's own training
    frozen = tv.retinanet_resnet50_fpn(weights=None, weights_backbone=None, score_thresh=0.0).eval()
    frozen.backbone.body = build_detector(model.spec, SMALL).backbone.body
    frozen.load_state_dict(twin.state_dict(), strict=False)
    frozen.transform = model.transform
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model.backbone(x)["c5"], frozen.backbone(x)["c5"])

    monkeypatch.setattr(published, "is_published", lambda *_: True)
    monkeypatch.setattr(published, "_download", lambda _: old_spelling(twin.state_dict()))
    overwrite_eps(frozen, 0.0)
    for source in (path, "torchvision"):
        model, metadata = load_detector(source, SMALL, model=name)
        assert metadata["published"] == {"box_map": 36.4}
        known = dict(zip(metadata["category_ids"], metadata["classes"], strict=True))
        assert (known[1], known[90], len(known)) == ("person", "toothbrush", 90)
        torch.testing.assert_close(model.backbone(x)["c5"], frozen.backbone(x)["c5"])
        again, _ = load_detector(save(tmp_path / "again.safetensors", model, **metadata))
        assert torch.equal(again.backbone(x)["c5"], model.backbone(x)["c5"])
    for norm in ("batch", "sync"):  # into norms of another kind
        started = build_detector(DetectorSpec(model=name, num_classes=91, norm=norm, frozen_stages="c2"), SMALL).eval()
        start_from(started, "torchvision", metadata["category_ids"], metadata["classes"])
        torch.testing.assert_close(started.backbone(x)["c5"], frozen.backbone(x)["c5"])
    with pytest.raises(InputError, match="torchvision published several detectors"):
        load_detector("torchvision")
    with pytest.raises(InputError, match="does not hold torchvision's fcos_resnet50_fpn"):
        load_detector(path, model="fcos_resnet50_fpn")


def test_no_network_is_said_in_a_line(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    for what in (lambda: published.fetch("fcos_resnet50_fpn"), lambda: published.resnet50_weights("torchvision")):
        with pytest.raises(InputError, match="cannot download https://.*no route to host.*give its path"):
            what()
    with pytest.raises(InputError, match="torchvision has no weights of fcos_cspresnet50_fpn"):
        published.fetch("fcos_cspresnet50_fpn")
    with pytest.raises(InputError, match="torchvision has no weights of cspresnet10"):
        small("fcos", weights_backbone="torchvision")


def test_published_files_are_known_by_their_hash(tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_bytes(b"weights")
    monkeypatch.setattr(published, "sha256", lambda _: "99b0c9b7" + "0" * 56)
    assert published.is_published("fcos_resnet50_fpn", tmp_path / "w.pth")
    assert not published.is_published("retinanet_resnet50_fpn", tmp_path / "w.pth")


@torch.inference_mode()
def test_images_are_not_resized_again():
    model = small("fcos", score_threshold=0.0).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model([torch.rand(3, 100, 60)])
    assert seen == [(1, 3, 128, 128)]


def kinds(model) -> set[type]:
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, FrozenBatchNorm2d)
    return {type(module) for module in model.modules() if isinstance(module, norms)}


def frozen_children(model) -> int:
    body = model.backbone.body
    return sum(
        not any(p.requires_grad for p in m.parameters())
        for m in (*body.stem, *body.stages)
        if len(list(m.parameters()))
    )


def test_norms_and_frozen_stages(tmp_path):
    weights = tmp_path / "w.pth"
    torch.save(create_model("cspresnet10", 5).state_dict(), weights)
    retina = "retinanet"
    assert kinds(small(retina)) == {nn.BatchNorm2d} and frozen_children(small(retina)) == 0
    pretrained = small(retina, weights_backbone=weights)
    assert kinds(pretrained) == {FrozenBatchNorm2d} and frozen_children(pretrained) == 2  # stem and c2
    state = torch.load(weights, weights_only=True)
    assert all(torch.equal(value, state[key]) for key, value in pretrained.backbone.body.state_dict().items())
    other = small(retina, weights_backbone=weights, norm="batch", frozen_stages="stem")
    assert kinds(other) == {nn.BatchNorm2d} and frozen_children(other) == 1
    assert not other.train().backbone.body.stem[0].bn.training  # its statistics stay as they are
    assert kinds(small("fasterrcnn", neck="fpn_v2", norm="sync")) == {nn.SyncBatchNorm}
    assert kinds(small("fasterrcnn", neck="fpn_v2", norm="group")) == {nn.GroupNorm}
    with pytest.raises(InputError, match="norm=frozen freezes random weights: give weights_backbone"):
        small(retina, norm="frozen")
    with pytest.raises(InputError, match="frozen_stages=c3 freezes random weights"):
        small(retina, frozen_stages="c3")
    with pytest.raises(InputError, match="trained with BatchNorm, whose statistics GroupNorm"):
        small(retina, weights_backbone=weights, norm="group")


@pytest.mark.parametrize("family", ["fasterrcnn", "maskrcnn"])
def test_neck_and_heads_over_a_frozen_backbone_are_synced(family, tmp_path, monkeypatch):
    weights = tmp_path / "w.pth"
    torch.save(create_model("cspresnet10", 5).state_dict(), weights)
    assert kinds(small(family, neck="fpn_v2", weights_backbone=weights)) == {FrozenBatchNorm2d, nn.BatchNorm2d}
    monkeypatch.setattr("detection.models.world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert kinds(small(family, neck="fpn_v2", weights_backbone=weights)) == {FrozenBatchNorm2d, nn.SyncBatchNorm}
    batch = small(family, neck="fpn_v2", weights_backbone=weights, norm="batch")
    assert kinds(batch) == {nn.BatchNorm2d}


def test_group_norm_looks_at_one_image_alone():
    body = create_model("cspdarknet10", 0, batchnorm="group").train()
    groups = {m.num_groups for m in body.modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {16, 32}  # 16 channels have no 32 groups
    images = torch.randn(2, 3, 64, 64)
    alone = body.forward_features(images[:1])["c5"]
    torch.testing.assert_close(body.forward_features(images)["c5"][:1], alone, rtol=1e-3, atol=1e-4)


def config_of(tmp_path, *overrides: str) -> DetectorConfig:
    path = tmp_path / "c.yaml"
    path.write_text("model: fcos_cspresnet10_fpn\npreprocess: {min_size: 128, max_size: 128}\n")
    return load_config(DetectorConfig, path, overrides)


def test_a_config_says_whether_weights_will_come(tmp_path):
    assert spec_of(config_of(tmp_path), 4).norm == "batch"
    for key in ("weights", "weights_backbone"):
        spec = spec_of(config_of(tmp_path, f"{key}=w.safetensors", "levels=[c3, c4]", "nms_iou=0.4"), 4)
        assert (spec.norm, spec.frozen_stages, spec.levels, spec.nms_iou) == ("frozen", "c2", ("c3", "c4"), 0.4)
        assert spec_of(config_of(tmp_path, f"{key}=w", "norm=frozen", "frozen_stages=none"), 4).frozen_stages == "none"
    with pytest.raises(InputError, match="norm=frozen freezes random weights"):
        spec_of(config_of(tmp_path, "norm=frozen"), 4)


@pytest.mark.parametrize(
    "settings",
    [{"norm": "frozen", "frozen_stages": "c2"}, {"norm": "batch"}, {"norm": "sync"}, {"norm": "group"},
     {"levels": ("c2", "c3"), "extra_levels": "pool"}],
)  # fmt: skip
@torch.inference_mode()
def test_saved_detectors_come_back(tmp_path, settings):
    spec = DetectorSpec(model="fcos_cspresnet10_efm", num_classes=4, fpn_channels=64, **settings)
    model = build_detector(spec, SMALL).eval()
    path = save(tmp_path / "w.safetensors", model)
    again, metadata = load_detector(path, score_threshold=0.01, model="fcos_cspresnet10_efm")
    assert thresholds(again)["score_threshold"] == 0.01 == metadata["detector"]["score_threshold"]
    again = load_detector(path)[0].eval()
    for key, value in model([IMAGES[0]])[0].items():
        assert torch.equal(again([IMAGES[0]])[0][key], value)


def test_starting_from_another_detector(tmp_path):
    source = small("retinanet")
    path = save(tmp_path / "w.safetensors", source)
    model = create_detector("retinanet_cspresnet10_fpn", 7, fpn_channels=64, preprocess=SMALL)
    said = start_from(model, path, range(6), "abcdef")
    total = sum(not key.endswith("num_batches_tracked") for key in model.state_dict())
    assert f"a retinanet_cspresnet10_fpn: {total - 2} of {total} tensors" in said
    assert said.endswith("left as they were, being of other classes: head.classification_head.cls_logits")
    for key, value in source.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]) == ("cls_logits" not in key)
    # A frozen backbone is filled as well, and other levels' convolutions of the same shape are not taken for these.
    spec = DetectorSpec(
        model="fcos_cspresnet10_fpn", num_classes=4, fpn_channels=64, norm="frozen", levels=("c2", "c3", "c4")
    )
    other = build_detector(spec, SMALL)
    said = start_from(other, path, **CATEGORIES)
    assert all(
        torch.equal(v, source.backbone.body.state_dict()[k]) for k, v in other.backbone.body.state_dict().items()
    )
    assert "left as they were: backbone.fpn" in said and "not used: backbone.body.stages.3" in said


@pytest.mark.parametrize("name", NAMES)
def test_these_layers_alone_know_their_classes(name):
    with torch.device("meta"):
        few, many = (create_detector(name, count, fpn_channels=64).state_dict() for count in (4, 5))
    of_classes = {key for key in few if any(part in key for part in OF_CLASSES)}
    assert of_classes == {key for key in few if few[key].shape != many[key].shape} != set()


def test_heads_are_taken_over_for_the_same_categories_alone(tmp_path):
    source = small("fasterrcnn")
    path = save(tmp_path / "w.safetensors", source)
    key = "roi_heads.box_predictor.cls_score.weight"
    for other in ({}, {"classes": ["red", "green", "dog"]}, {"category_ids": [2, 3, 8]}):
        model = small("fasterrcnn")
        said = start_from(model, path, **CATEGORIES | other)
        assert torch.equal(model.state_dict()[key], source.state_dict()[key]) == (not other)
        assert ("being of other classes: roi_heads.box_predictor.cls_score" in said) == bool(other)
        assert torch.equal(model.rpn.head.cls_logits.weight, source.rpn.head.cls_logits.weight)


def test_heads_may_go_over_a_backbone_with_weights_of_its_own(tmp_path):
    path = save(tmp_path / "w.safetensors", small("fcos", "cspresnext10"))
    torch.save(create_model("cspresnet10", 5).state_dict(), tmp_path / "body.pth")
    model = small("fcos", weights_backbone=tmp_path / "body.pth")
    before = {key: value.clone() for key, value in model.backbone.body.state_dict().items()}
    assert "left as they were: backbone.body" in start_from(model, path, **CATEGORIES, body_loaded=True)
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.body.state_dict().items())


def test_what_cannot_be_started_from(tmp_path):
    path = save(tmp_path / "w.safetensors", small("fcos"))
    frozen = DetectorSpec(model="fcos_cspresnext10_fpn", num_classes=4, fpn_channels=64, norm="frozen")
    with pytest.raises(InputError, match="lacks backbone.body.* would stay random: give norm=batch"):
        start_from(build_detector(frozen, SMALL), path, **CATEGORIES)
    with pytest.raises(InputError, match="trained with norm=batch, which norm=group is not: set norm=frozen or"):
        start_from(small("fcos", norm="group"), path, **CATEGORIES)
    with pytest.raises(
        InputError, match=r"nothing of .*w.safetensors, a fcos_cspresnet10_fpn, fits fasterrcnn_cspresnext10_efm"
    ):
        start_from(small("fasterrcnn", "cspresnext10", "efm"), path, **CATEGORIES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"levels": levels}, "give neighbours of") for levels in [(), ("c3", "c2"), ("c2", "c4"), ("c3", "c3")]]
    + [({"levels": ("c2", "c3"), "frozen_stages": "c4"}, "frozen_stages=c4 is above the highest of levels="),
       ({"levels": ("c5", "c6")}, "levels: 1: Input should be"), ({"nrom": "batch"}, "nrom: Extra inputs")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["fcos_cspresnet10_fpn", "fcos_resnet50_fpn"])
def test_bad_settings(name, settings, message):
    with pytest.raises(InputError, match=f"^{name}: .*{message}"):
        create_detector(name, **settings)


def test_bad_names_and_files(tmp_path):
    with pytest.raises(InputError, match="unknown detector 'fcos_cspresnet5_fpn': did you mean"):
        create_detector("fcos_cspresnet5_fpn")
    for name in ("yolo", "fcos_resnet50_fpn_v2", "fcos_resnet50_plain_fpn", "fcos_cspresnet50_pan"):
        with pytest.raises(InputError, match=f"unknown detector '{name}'"):
            create_detector(name)
    assert canonical_name("maskrcnn_cspdarknet53_plain_efm_v2") == "maskrcnn_cspdarknet50_plain_efm_v2"
    for name in names(["cspdarknet53", "cspdarknet53_plain", "cspdarknet53_paper", "darknet53", "resnet50"]):
        assert without_alias(name) == canonical_name(name)
    for name in ("cspdarknet53", "cspdarknet53_paper_plain", "nonesuch", "fcos_nonesuch_fpn"):
        assert without_alias(name) == {"cspdarknet53": "cspdarknet50"}.get(name, name)
    assert families.FAMILIES.keys() == set(FAMILY_NAMES)
    assert has_masks("maskrcnn_resnet50_fpn") and not has_masks("fasterrcnn_resnet50_fpn")
    save_weights(tmp_path / "c.safetensors", create_model("cspresnet10", 2), {"model": "cspresnet10"})
    with pytest.raises(InputError, match="holds cspresnet10, no detector"):
        load_detector(tmp_path / "c.safetensors")
    path = save(tmp_path / "d.safetensors", small("fcos"), detector={"model": "fcos_cspresnet10_fpn", "neck": 1})
    for read in (load_detector, lambda source: start_from(small("fcos"), source, **CATEGORIES)):
        with pytest.raises(InputError, match="d.safetensors, perhaps written by another version: .*: ") as error:
            read(path)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="holds fcos_cspresnet10_fpn, not fcos_cspresnet50_fpn: set model="):
        load_detector(path, model="fcos_cspresnet50_fpn")
