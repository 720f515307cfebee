"""One number: the checkpoint, the artefact, the endpoint and the batch job agree, image by image."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from artifacts import write_classifier
from jobs import job

import backbones.evaluate
import detection.evaluate
from backbones.config import ClassifierConfig, load_config
from backbones.errors import InputError
from backbones.files import write_json
from detection.config import DetectorConfig
from serving.__main__ import main
from serving.artifact import read_artifact
from serving.batch import run_batch
from serving.config import ServingConfig
from serving.evaluate import ArtifactSource, EndpointSource, ResultsSource, run_eval
from serving.jobs.results import Row, to_table
from serving.predictor import Classification
from serving.serve import start
from serving.shapes import CLASSES, draw_classification, draw_detection

CONFIGS = Path(__file__).parents[1] / "configs" / "quickstart"


def draw_three_classes(root: Path, images: int) -> None:
    draw_classification(root, {"val": images}, seed=1, size=48)
    shutil.rmtree(root / "val" / CLASSES[3])  # the tiny classifier has three classes


def annotate_own_detections(root: Path, name: str, config: str, overrides: list[str]) -> None:
    """Make every third detection of a random detector the truth, so that there is something to find."""
    path = root / f"{name}.json"
    images = json.loads((root / "d" / "val.json").read_text())["images"]
    categories = [{"id": 5, "name": "cat"}, {"id": 90, "name": "dog"}]
    write_json(path, {"images": images, "categories": categories, "annotations": []})
    weights = f"weights={root / name}.safetensors"
    detection.evaluate.run_eval(load_config(DetectorConfig, config, [*overrides, weights]))
    found = json.loads((root / "detections.json").read_text())[::3]
    keys = ("image_id", "category_id", "bbox", "segmentation")
    truth = [{key: row[key] for key in keys if key in row} for row in found]
    write_json(path, {"images": images, "categories": categories, "annotations": truth})


@pytest.fixture(scope="module")
def line(exported, tmp_path_factory):
    """Data, artefacts, batch results and a live service; and the arguments of `eval` for the classifier, for the
    detector and for the one with masks.
    """
    root = tmp_path_factory.mktemp("line")
    torch.manual_seed(0)
    draw_three_classes(root / "c", 30)
    draw_detection(root / "d", {"val": 13}, seed=1, size=160)
    for name, artifact in (("c", exported("classifier")), ("d", exported("fcos")), ("m", exported("maskrcnn"))):
        shutil.copy(artifact, root / f"{name}.onnx")
        shutil.copy(artifact.with_name("w.safetensors"), root / f"{name}.safetensors")
    classifier = [
        f"data.root={root / 'c'}", "num_classes=3", "preprocess.resize=40", "preprocess.crop=32", f"output={root}",
    ]  # fmt: skip
    common = [
        f"data.images={root / 'd' / 'val'}", f"output={root}", "preprocess.min_size=96", "preprocess.max_size=128",
        "score_threshold=0.2", "max_detections=30",
    ]  # fmt: skip
    detector = [*common, f"data.annotations={root / 'd.json'}"]
    masks = [*common, f"data.annotations={root / 'm.json'}", "model=maskrcnn_cspresnet10_fpn"]
    annotate_own_detections(root, "d", str(CONFIGS / "detector.yaml"), detector)
    annotate_own_detections(root, "m", str(CONFIGS / "detector.yaml"), masks)
    models = [{"name": name, "artifact": str(root / f"{name}.onnx")} for name in "cdm"]
    with start(ServingConfig.model_validate({"port": 0, "models": models})) as service:
        run_batch(job({"c": root / "c.onnx"}, root / "c" / "val", root / "of-c", batch_size=4))
        both = {name: root / f"{name}.onnx" for name in "dm"}
        run_batch(job(both, root / "d", root / "of-d", batch_size=3, part_rows=8))
        yield (
            root,
            service.url,
            (str(CONFIGS / "classifier.yaml"), classifier),
            (str(CONFIGS / "detector.yaml"), detector),
            (str(CONFIGS / "detector.yaml"), masks),
        )


def sources(root: Path, url: str, name: str):
    endpoint = EndpointSource(f"{url}/v2/models/{name}")
    return (
        ArtifactSource(root / f"{name}.onnx", "cpu"),
        endpoint,
        ResultsSource(root / ("of-c" if name == "c" else "of-d") / name),
    )


def test_classifier(line):
    root, url, (config, overrides), *_ = line
    checkpoint = load_config(ClassifierConfig, config, [*overrides, f"weights={root / 'c.safetensors'}"])
    expected = backbones.evaluate.run_eval(checkpoint)
    for source in sources(root, url, "c"):
        result, _ = run_eval(config, overrides, source)
        assert {key: result[key] for key in ("top1", "top5", "images", "per_class")} == {
            key: expected[key] for key in ("top1", "top5", "images", "per_class")
        }, source.name


def test_detector(line):
    root, url, _, (config, overrides), _ = line
    checkpoint = load_config(DetectorConfig, config, [*overrides, f"weights={root / 'd.safetensors'}"])
    expected = detection.evaluate.run_eval(checkpoint)
    assert 0 < expected["AP50"] < 1
    for source in sources(root, url, "d"):
        result, _ = run_eval(config, overrides, source)
        assert result["AP50"] == pytest.approx(expected["AP50"], abs=1e-6), source.name
        assert result["detections"] == expected["detections"]


@pytest.mark.parametrize("model", ["fasterrcnn_cspresnet10_fpn_v2", "fcos_cspresnet10_efm"])
def test_a_detector_is_known_by_any_of_its_names(line, model):
    root, _, _, (config, overrides), _ = line
    with pytest.raises(InputError, match=f"the config's model is {model}, the artefact's is fcos_cspresnet10_fpn"):
        run_eval(config, [*overrides, f"model={model}"], ArtifactSource(root / "d.onnx"))


def test_masks(line):
    root, url, *_, (config, overrides) = line
    checkpoint = load_config(DetectorConfig, config, [*overrides, f"weights={root / 'm.safetensors'}"])
    expected = detection.evaluate.run_eval(checkpoint)
    assert 0 < expected["AP50"] < 1
    assert 0 < expected["segm"]["AP50"] < 1
    for source in sources(root, url, "m"):
        result, summary = run_eval(config, overrides, source)
        for kind, figures in ((result, expected), (result["segm"], expected["segm"])):
            for name in ("AP", "AP50"):
                assert kind[name] == pytest.approx(figures[name], abs=1e-6), (source.name, name)
        assert result["precision"] == "fp32"
        assert "masks AP " in summary


@pytest.mark.parametrize("name", ["c", "d", "m"])
def test_artefact_endpoint_and_job_agree_to_the_bit(line, name):
    root, url, *_ = line
    folder = root / ("c" if name == "c" else "d") / "val"
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    artifact, endpoint, job = (list(source.rows(paths)) for source in sources(root, url, name))
    assert len(artifact) == len(paths)
    for one, *others in zip(artifact, endpoint, job, strict=True):
        for other in others:
            if name == "c":
                np.testing.assert_array_equal(one.result.indices[:5], other.result.indices[:5])
                np.testing.assert_array_equal(one.result.probabilities[:5], other.result.probabilities[:5])
            else:
                assert one.result.size == other.result.size
                for part in ("boxes", "scores", "indices"):
                    np.testing.assert_array_equal(getattr(one.result, part), getattr(other.result, part))
                if name == "m":
                    assert list(one.result.masks) == list(other.result.masks)
                else:
                    assert one.result.masks is other.result.masks is None


def test_commands(line, capsys):
    root, url, (config, overrides), (detector, more), _ = line
    main(["eval", config, "--model", str(root / "c.onnx"), *overrides])  # overrides may follow options
    main(["eval", config, *overrides, "--endpoint", url])  # the one model of the config's network is found
    main(["eval", detector, *more, "--predictions", str(root / "of-d" / "d")])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-3].split(";")[0] == lines[-2].split(";")[0]
    assert "AP50" in lines[-1]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["model=cspresnext10"], "the config's model is cspresnext10, the artefact's is cspresnet10"),
        (["model=cspresnet9"], "the config's model is cspresnet9, the artefact's is cspresnet10"),
        (["preprocess.crop=30"], "the config's preprocess is resize 40 bicubic, centre crop 30, the artefact's is"),
        (["data.root=/nowhere"], "data.root=/nowhere is no folder"),
        (["data.on_error=skip"], "data.on_error=skip and data.real_labels are for checkpoints"),
        (["data.real_labels=real.json"], "data.on_error=skip and data.real_labels are for checkpoints"),
        (["data.decoder=opencv"], "the config's data.decoder is opencv, the artefact's is pillow"),
    ],
)
def test_another_protocol_or_data_set_is_refused(line, extra, message):
    root, _, (config, overrides), *_ = line
    with pytest.raises(InputError, match=message):
        run_eval(config, [*overrides, *extra], ArtifactSource(root / "c.onnx"))


def test_other_thresholds_than_the_artefacts_are_refused(line):
    root, _, _, (config, overrides), _ = line
    with pytest.raises(InputError, match="the config's score_threshold is 0.7, the artefact's is 0.2"):
        run_eval(config, [*overrides, "score_threshold=0.7"], ArtifactSource(root / "d.onnx", "cpu"))


def test_a_job_on_a_part_is_no_evaluation_of_the_whole(line):
    root, _, (config, overrides), *_ = line
    run_batch(job(root / "c.onnx", root / "c" / "val" / "circle", root / "part"))
    with pytest.raises(InputError, match="has no row for .*: was the job run on this data set"):
        run_eval(config, overrides, ResultsSource(root / "part" / "m"))


def test_results_of_another_data_set_and_broken_images(line, tmp_path):
    root, _, (config, overrides), *_ = line
    draw_three_classes(tmp_path, 12)
    (tmp_path / "val" / "circle" / "9999.png").write_bytes(b"broken")
    here = [*overrides, f"data.root={tmp_path}"]
    with pytest.raises(InputError, match="has no row for .*9999.png"):
        run_eval(config, here, ResultsSource(root / "of-c" / "c"))
    with pytest.raises(InputError, match=r"9999.png.*cannot be decoded"):
        run_eval(config, here, ArtifactSource(root / "c.onnx"))


def test_rows_of_a_list_may_have_absolute_paths(tmp_path):
    metadata = read_artifact(write_classifier(tmp_path / "m.onnx"))[0]
    given = [tmp_path / "a" / "1.png", tmp_path / "b" / "1.png"]
    rows = [Row(str(path), Classification(np.array([i]), np.array([1], np.float32))) for i, path in enumerate(given)]
    pq.write_table(to_table(rows, metadata), tmp_path / "r.parquet")
    found = [row.result.indices[0] for row in ResultsSource(tmp_path / "r.parquet").rows(given[::-1])]
    assert found == [1, 0]
