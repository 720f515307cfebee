from pathlib import Path

import pytest
import torch
import yaml
from torchvision.models import get_model_weights

from backbones.config import load_config
from backbones.plan import Plan
from detection.config import DetectorConfig, DetectorTraining
from detection.models import build_detector, canonical_name, spec_of

COCO = Path(__file__).parents[1] / "configs" / "coco"
FILES = sorted(COCO.glob("*.yaml"))
BACKBONES = ("cspresnet50", "cspresnext50", "cspdarknet50", "resnet50")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_of_coco_is_complete(path):
    given = yaml.safe_load(path.read_text())
    left_out = DetectorTraining.model_fields.keys() - given["train"].keys()
    assert left_out == {"poly_power", "decay_epochs"}  # of other schedules
    config = load_config(DetectorConfig, path)
    assert config.model == canonical_name(config.model)
    assert Path(config.output).name == path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_names_what_torchvision_published_for_it(path):
    text = path.read_text()
    name = load_config(DetectorConfig, path).model.replace("cspresnet50", "resnet50")
    metrics = get_model_weights(name).DEFAULT.meta["_metrics"]["COCO-val2017"]
    assert f"AP {metrics['box_map']:.1f}" in text
    assert "mask_map" not in metrics or f"masks {metrics['mask_map']:.1f}" in text
    assert all(name.replace("resnet50", backbone) in text for backbone in BACKBONES)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_recipe_builds_over_each_backbone(path, backbone):
    config = load_config(DetectorConfig, path)
    name = config.model.replace("cspresnet50", backbone)
    config = load_config(DetectorConfig, path, [f"model={name}"])
    with torch.device("meta"):
        model = build_detector(spec_of(config, 81), config.preprocess)
    frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    assert all(key.startswith("backbone.body.") for key in frozen)
    assert bool(frozen) == (config.frozen_stages == "c2")


@pytest.mark.parametrize(
    ("name", "images", "lr"), [("fasterrcnn", 16, 0.02), ("fcos", 16, 0.01), ("maskrcnn_v2", 64, 0.1)]
)
def test_a_recipe_is_torchvisions_on_its_number_of_gpus(name, images, lr, monkeypatch):
    config = load_config(DetectorConfig, COCO / f"{name}.yaml")
    monkeypatch.setattr("backbones.plan.world_size", lambda: images // config.data.batch_size)
    plan = Plan(config.train, 118287, config.data.batch_size, seed=0)
    assert (plan.step, plan.lr) == (images, lr)
    assert plan.steps * plan.warmup_epochs == pytest.approx(1000, rel=0.01)
    assert plan.lrs(config.train.epochs - 1)[-1] == pytest.approx(lr / 100)
    one_x = load_config(DetectorConfig, COCO / f"{name}.yaml", ["train.epochs=12", "train.milestones=[8,11]"])
    assert Plan(one_x.train, 118287, config.data.batch_size, seed=0).lrs(9)[0] == pytest.approx(lr / 10)
