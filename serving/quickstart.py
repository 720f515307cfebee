"""The whole line on drawn data: train, evaluate, export, serve, run in batch, and hold the figures side by side."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from PIL import Image

import backbones.evaluate
import backbones.train
import detection.evaluate
import detection.train
from backbones.config import ClassifierConfig, load_config
from backbones.files import list_images, write_json
from detection.config import DetectorConfig
from serving.api.schemas import parse_detect
from serving.artifact import DetectorArtifact
from serving.batch import run_batch
from serving.client import Client
from serving.config import ServingConfig
from serving.evaluate import ArtifactSource, EndpointSource, ResultsSource, Source, run_eval
from serving.export import run_export
from serving.jobs.config import BatchConfig
from serving.proof.agreement import Disagreement
from serving.report import annotate, curves, write_page
from serving.serve import start
from serving.shapes import draw_classification, draw_detection

CONFIGS = Path(__file__).parent.parent / "configs" / "quickstart"
IMAGES = {"train": 1600, "val": 200}  # of the classifier
SCENES = {"train": 400, "val": 100}  # of the detector
SEED = 0
HEADER = ("measured on", "top-1", "AP50")


def run_quickstart(output: str | Path) -> dict[str, Any]:
    """Do it all below `output` and return the figures by where they were measured.

    Raises:
        InputError: a step failed, or the figures differ.
    """
    started = time.perf_counter()
    root = Path(output)
    classifier, detector = _configs(root)

    def step(text: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {text}", flush=True)

    step("drawing shapes")
    draw_classification(root / "data/classification", IMAGES, SEED)
    draw_detection(root / "data/detection", SCENES, SEED)
    step("training a classifier")
    history = {"classifier": backbones.train.run_train(load_config(ClassifierConfig, *classifier))["history"]}
    step("training a detector on its backbone")
    history["detector"] = detection.train.run_train(load_config(DetectorConfig, *detector))["history"]

    step("evaluating both checkpoints")
    weights = {name: root / name / "best.safetensors" for name in ("classifier", "detector")}
    figures = {"checkpoint, PyTorch": _checkpoints(classifier, detector, weights)}
    for name, path in weights.items():
        step(f"exporting the {name}")
        run_export(str(path), root / f"{name}.onnx")
    sources: tuple[Source, ...] = tuple(ArtifactSource(root / f"{name}.onnx", "cpu") for name in weights)
    figures["artefact, onnxruntime"] = _score(classifier, detector, *sources)

    step("starting Ray Serve")
    with start(_service(root)) as service:
        sources = tuple(EndpointSource(f"{service.url}/v2/models/{name}") for name in weights)
        figures["endpoint, Ray Serve"] = _score(classifier, detector, *sources)
        pictures = _pictures(root, service.url)
        step("running batch jobs")
        for name, folder in (("classifier", "classification"), ("detector", "detection")):
            run_batch(_job(root, name, folder))
        step("stopping")
    sources = tuple(ResultsSource(root / "batch" / name / name) for name in weights)
    figures["batch job, Ray Data"] = _score(classifier, detector, *sources)

    table = [(place, f"{top1:.4f}", f"{ap50:.4f}") for place, (top1, ap50) in figures.items()]
    seconds = time.perf_counter() - started
    _report(root, table, history, pictures, seconds)
    print("\n".join("{:<24}{:>8}{:>8}".format(*row) for row in (HEADER, *table)))
    print(f"done in {seconds:.0f} s; open {root / 'index.html'}")
    if len({row[1:] for row in table}) > 1:
        raise Disagreement(f"the figures differ between the places they were measured at: see {root / 'index.html'}")
    return {place: {"top1": top1, "ap50": ap50} for place, (top1, ap50) in figures.items()}


def _configs(root: Path) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
    """The two config files and what they need to know of `root`."""
    data = root / "data/detection"
    classifier = _overrides({"data.root": root / "data/classification", "output": root / "classifier"})
    detector = _overrides(
        {
            "weights_backbone": root / "classifier/best.safetensors",
            "data.train_images": data / "train", "data.train_annotations": data / "train.json",
            "data.images": data / "val", "data.annotations": data / "val.json",
            "output": root / "detector",
        }
    )  # fmt: skip
    return (str(CONFIGS / "classifier.yaml"), classifier), (str(CONFIGS / "detector.yaml"), detector)


def _overrides(paths: dict[str, Path]) -> list[str]:
    return [f"{key}={json.dumps(str(path))}" for key, path in paths.items()]  # quoted, whatever the name


Config = tuple[str, list[str]]


def _checkpoints(classifier: Config, detector: Config, weights: dict[str, Path]) -> tuple[float, float]:
    first = load_config(
        ClassifierConfig, classifier[0], [*classifier[1], *_overrides({"weights": weights["classifier"]})]
    )
    trained = _overrides({"weights": weights["detector"]})
    second = load_config(DetectorConfig, detector[0], [*detector[1], *trained])
    return backbones.evaluate.run_eval(first)["top1"], detection.evaluate.run_eval(second)["AP50"]


def _score(classifier: Config, detector: Config, first: Source, second: Source) -> tuple[float, float]:
    return run_eval(*classifier, first)[0]["top1"], run_eval(*detector, second)[0]["AP50"]


def _service(root: Path) -> ServingConfig:
    models = [{"name": name, "artifact": str(root / f"{name}.onnx")} for name in ("classifier", "detector")]
    return ServingConfig.model_validate({"port": 0, "models": models})


def _job(root: Path, name: str, data: str) -> BatchConfig:
    output = root / "batch" / name
    shutil.rmtree(output, ignore_errors=True)  # an earlier quickstart's, of other artefacts
    models = [{"name": name, "artifact": str(root / f"{name}.onnx")}]
    return BatchConfig.model_validate(
        {"input": str(root / f"data/{data}/val"), "output": str(output), "models": models}
    )


def _pictures(root: Path, url: str) -> list[tuple[Image.Image, str]]:
    """Some held-out images with the endpoint's answers."""
    pictures = []
    with Client(url) as client:
        artifact = client.artifact("detector")
        assert isinstance(artifact, DetectorArtifact)
        for path in list_images(root / "data/detection/val")[:8]:
            with Image.open(path) as image:
                found = parse_detect(client.detect("detector", path, score_threshold=0.4), artifact)
                pictures.append((annotate(image.convert("RGB"), found, artifact.classes), path.name))
        for path in list_images(root / "data/classification/val")[::25]:
            best = client.classify("classifier", path, top_k=1)["predictions"][0]
            with Image.open(path) as image:
                caption = f"{path.parent.name}: {best['label']} {best['score']:.2f}"
                pictures.append((image.resize((128, 128)), caption))
    return pictures


def _report(
    root: Path,
    table: list[tuple[str, str, str]],
    history: dict[str, list[dict[str, float]]],
    pictures: list[tuple[Image.Image, str]],
    seconds: float,
) -> None:
    def line(name: str, key: str) -> list[float]:
        return [entry[key] for entry in history[name]]

    panels = {
        "loss": {name: line(name, "loss") for name in history},
        "held out": {
            "top-1 of the classifier": line("classifier", "top1"),
            "AP50 of the detector": line("detector", "AP50"),
        },
    }
    agree = "agree to the printed digit" if len({row[1:] for row in table}) == 1 else "DIFFER"
    notes = (
        "One classifier and one detector, trained on drawn shapes and measured in four places on the same held-out "
        f"images. The figures {agree}. The whole took {seconds:.0f} s."
    )
    write_page(root / "index.html", "cspnet quickstart", HEADER, table, curves(panels), pictures, [notes])
    write_json(root / "quickstart.json", {"figures": table, "history": history, "seconds": seconds})
