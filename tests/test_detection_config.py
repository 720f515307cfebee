import argparse
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.models import get_model_weights

from backbones.config import load_config
from backbones.plan import Plan
from detection.config import DetectorConfig, DetectorTraining
from detection.models import build_detector
from detection.spec import canonical_name, spec_of

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
    published = get_model_weights(name).DEFAULT.meta
    assert f"# {published['recipe']}\n" in text
    metrics = published["_metrics"]["COCO-val2017"]
    assert f"AP {metrics['box_map']:.1f}" in text
    assert "mask_map" not in metrics or f"masks {metrics['mask_map']:.1f}" in text
    lines = [line for line in text.splitlines() if line.startswith("#   model=")]
    assert all(
        f"={name.replace('resnet50', backbone)} " in line for backbone, line in zip(BACKBONES[1:], lines, strict=True)
    )
    outputs = {load_config(DetectorConfig, path, line[1:].split()).output for line in lines}
    assert len(outputs | {load_config(DetectorConfig, path).output}) == 4  # none writes over another


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


# How torchvision trained each: what its reference training's README says or, of second versions, the pull request
# (5763, 5773, 5756) that added the weights; and that script's defaults.
THREE_X = "--epochs 26 --lr-steps 16 22 --aspect-ratio-group-factor 3"
COMMANDS = {
    "fasterrcnn": f"{THREE_X} --weights-backbone ResNet50_Weights.IMAGENET1K_V1",
    "fasterrcnn_v2": "--nodes 4 --epochs 400 --lr-steps 352 384 --lr 0.1 --batch-size 2 --weight-decay 0.00004 "
    "--sync-bn --data-augmentation lsj",
    "fcos": f"{THREE_X} --lr 0.01 --amp --weights-backbone ResNet50_Weights.IMAGENET1K_V1",
    "maskrcnn": f"{THREE_X} --weights-backbone ResNet50_Weights.IMAGENET1K_V1",
    "maskrcnn_v2": "--nodes 4 --epochs 400 --lr-steps 352 384 --lr 0.1 --batch-size 2 --weight-decay 0.00004 "
    "--sync-bn --data-augmentation lsj",
    "retinanet": f"{THREE_X} --lr 0.01 --weights-backbone ResNet50_Weights.IMAGENET1K_V1",
    "retinanet_v2": "--weights-backbone ResNet50_Weights.IMAGENET1K_V2 --opt adamw --lr 0.0001 --epochs 26 "
    "--lr-steps 16 22 --weight-decay 0.05 --norm-weight-decay 0.0 --data-augmentation multiscale --sync-bn",
}


def torchvisions(command: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for flag, default in (
        ("nodes", 1), ("batch-size", 2), ("lr", 0.02), ("momentum", 0.9), ("weight-decay", 1e-4), ("lr-gamma", 0.1),
        ("aspect-ratio-group-factor", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=type(default), default=default)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr-steps", type=float, nargs="+")
    parser.add_argument("--opt", default="sgd")
    parser.add_argument("--norm-weight-decay", type=float)
    parser.add_argument("--data-augmentation", default="hflip")
    parser.add_argument("--weights-backbone")
    parser.add_argument("--sync-bn", action="store_true")
    parser.add_argument("--amp", action="store_true")
    return parser.parse_args(command.split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_torchvisions_on_its_number_of_gpus(path, monkeypatch):
    config, theirs = load_config(DetectorConfig, path), torchvisions(COMMANDS[path.stem])
    train, gpus = config.train, 8 * theirs.nodes
    assert (train.epochs, train.milestones) == (theirs.epochs, (*theirs.lr_steps,))
    assert (train.optimizer, train.momentum, train.nesterov) == (theirs.opt, theirs.momentum, False)
    assert (train.weight_decay, train.decay_norms) == (theirs.weight_decay, theirs.norm_weight_decay is None)
    assert (train.decay_rate, config.data.aspect_ratio_groups) == (theirs.lr_gamma, theirs.aspect_ratio_group_factor)
    assert (config.weights, bool(config.weights_backbone)) == (None, bool(theirs.weights_backbone))
    assert (config.amp, config.norm == "sync") == (theirs.amp, theirs.sync_bn)
    assert (bool(train.scale_jitter), bool(train.min_sizes)) == (
        theirs.data_augmentation == "lsj", theirs.data_augmentation == "multiscale"
    )  # fmt: skip

    monkeypatch.setattr("backbones.plan.world_size", lambda: gpus)
    plan = Plan(train, 118287, config.data.batch_size, seed=0)
    assert (plan.step, plan.lr) == (gpus * theirs.batch_size, theirs.lr)
    assert plan.steps * plan.warmup_epochs == pytest.approx(1000, rel=0.01)
    assert plan.lrs(train.epochs - 1)[-1] == pytest.approx(theirs.lr / 100)
    one_x = load_config(DetectorConfig, path, ["train.epochs=12", "train.milestones=[8,11]"])
    assert Plan(one_x.train, 118287, config.data.batch_size, seed=0).lrs(9)[0] == pytest.approx(theirs.lr / 10)
