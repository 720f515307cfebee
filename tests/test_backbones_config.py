from pathlib import Path

import pytest
import yaml

from backbones.config import ClassifierConfig, ClassifierTraining, load_config
from backbones.errors import InputError
from backbones.published import protocol
from detection.config import DetectorConfig
from serving.config import ServingConfig
from serving.jobs.config import BatchConfig

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
QUICKSTART = CONFIGS / "quickstart" / "classifier.yaml"


def schema(path: Path) -> type:
    if path.parent.name == "serving":
        return ServingConfig
    if path.parent.name == "batch":
        return BatchConfig
    return DetectorConfig if "_fpn" in path.read_text() else ClassifierConfig


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_file_is_valid_and_opens_with_its_command(path):
    load_config(schema(path), path)
    first = path.read_text().splitlines()[0]
    assert first.startswith(("# python -m ", "# ray job submit "))
    assert str(path.relative_to(CONFIGS.parent)) in first


def test_a_single_epoch_takes_a_recipe_as_it_is():
    assert load_config(ClassifierConfig, QUICKSTART, ["train.epochs=1", "train.warmup_epochs=5"]).train.epochs == 1


@pytest.mark.parametrize("name", ["cspresnet50", "cspresnext50", "cspdarknet50"])
def test_evaluation_files_leave_each_model_its_own_protocol(name):
    path = CONFIGS / "imagenet" / f"{name}.yaml"
    for model in (name, "cs3darknet_x"):
        assert load_config(ClassifierConfig, path, [f"model={model}"]).preprocess == protocol(model)
    assert protocol("cs3darknet_x") != protocol(name)


def test_a_published_recipe_is_complete():
    for path in sorted((CONFIGS / "imagenet").glob("*.yaml")):
        given = yaml.safe_load(path.read_text())
        if "train" in given:
            left_out = ClassifierTraining.model_fields.keys() - given["train"].keys()
            assert left_out <= {"poly_power", "decay_rate", "decay_epochs", "milestones"}, path  # of other schedules
            assert ClassifierConfig.model_fields.keys() - given.keys() == {"resume"}


def test_overrides_reach_every_depth():
    config = load_config(
        ClassifierConfig, QUICKSTART, ["train.lr=1e-3", "data.workers=1", "weights=a=b.pth", "amp=true"]
    )
    assert (config.train.lr, config.data.workers, config.weights, config.amp) == (0.001, 1, "a=b.pth", True)
    served = load_config(ServingConfig, CONFIGS / "serving" / "local.yaml", ["models.1.replicas=3", "port=0"])
    assert [model.replicas for model in served.models] == [1, 3]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle=x", "unknown key 'modle': did you mean 'model'"),
        ("train.learning_rate=1", "unknown key 'train.learning_rate'"),
        ("train.epoch=1", "did you mean 'train.epochs'"),
        ("train.lr=fast", "train.lr='fast': "),
        ("train.lr=-1", "train.lr=-1: .*greater than 0"),
        ("train.optimizer=adam", "'sgd', 'adamw', 'lamb' or 'rmsprop'"),
        ("train.warmup_epochs=8", "train.warmup_epochs=8: the warm-up fills train.epochs=8"),
        ("preprocess.crop=99", "crop 99 is larger than resize 64"),
        ("train", "override 'train' has no '='"),
        ("seed=-1", "seed=-1: "),
        ("device=meta", "device='meta': "),
        ("model.name=x", "'model' is a plain value"),
        ("data.root={a", "is not valid YAML"),
    ],
)
def test_a_mistake_names_the_key_and_the_remedy(override, message):
    with pytest.raises(InputError, match=message) as error:
        load_config(ClassifierConfig, QUICKSTART, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot read config"), ("a: [", "not valid YAML"), ("- a", "must hold a mapping"), ("", "mapping")],
)
def test_a_file_that_is_no_config(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(ClassifierConfig, path)


def test_missing_keys_are_named(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("num_classes: 3\n")
    with pytest.raises(InputError, match="model is missing: "):
        load_config(ClassifierConfig, path)
    with pytest.raises(InputError, match="model is missing: .*preprocess is missing"):
        load_config(DetectorConfig, path)


def test_preprocessing_that_is_left_out_is_the_models_own(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: cspresnext50\n")
    config = load_config(ClassifierConfig, path, ["preprocess.crop=224"])
    assert (config.preprocess.resize, config.preprocess.crop) == (288, 224)
    assert config.preprocess.interpolation == "bilinear"  # as timm evaluates its weights


def test_paths_are_taken_as_they_stand(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for text, value in (("a #2", "a #2"), ("a: b", "a: b"), ("2012", "2012"), ("~/x", "/home/me/x"), ("'q'", "q")):
        assert load_config(ClassifierConfig, QUICKSTART, [f"data.root={text}"]).data.root == value
