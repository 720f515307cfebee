"""Artefacts beside PyTorch on real images: model x provider x batch size, detection by detection, and the metric.

    python -m benchmarks.parity --model NAME=WEIGHTS … --images DIR [--limit 200] [--batch-sizes 1 3 8]
        [--providers cpu openvino] [--artifact NAME=FILE …] [--config CONFIG [key=value …]] [--json FILE]

Each model is exported into a temporary folder, unless `--artifact` gives the file, and compared with PyTorch as export
does it (`serving/parity.py`), on the first `--limit` images of the folder or on all. Differences are of scores or
probabilities, and of boxes in pixels of the resized image; unmatched detections have no partner in the other's.

`--config` is of the data set that a metric is measured on: top-1, or AP50 of boxes and of masks, once by `backbones
eval` or `detection eval` on the weights and once a provider by `serving eval` on the artefact. Network, preprocessing
and weights are set from the model; so one config serves all models of a data set.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import backbones.evaluate
import detection.evaluate
from backbones.cli import at_least
from backbones.config import ClassifierConfig, load_config
from backbones.cspnet import create_model
from backbones.errors import InputError, exit_on_input_error
from backbones.files import list_images, versions, write_json
from backbones.preprocess import decode
from backbones.weights import read_metadata
from benchmarks.contest import table
from detection.config import DetectorConfig
from detection.families import Detector
from detection.weights import load_detector
from serving.artifact import DetectorArtifact, Parity, read_artifact
from serving.evaluate import ArtifactSource, run_eval
from serving.export import run_export
from serving.parity import measure_classifier, measure_detector
from serving.runtime import OnnxModel, Provider, usable_cores
from serving.sessions.providers import PROVIDERS

OUTPUTS = ("logits", "probabilities", "scores", "boxes", "masks")
METRICS = ("top-1", "AP50", "mask AP50")
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, action="append", type=_pair, metavar="NAME=WEIGHTS")
    parser.add_argument("--artifact", action="append", type=_pair, default=[], metavar="NAME=FILE.onnx")
    parser.add_argument("--images", required=True, metavar="DIR")
    parser.add_argument("--limit", type=at_least(1))
    parser.add_argument("--batch-sizes", nargs="+", type=at_least(1), default=(1, 3, 8))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=("cpu",))
    parser.add_argument("--config", nargs="+", metavar="CONFIG", help="of the data set to measure on; then key=value …")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(usable_cores())
    paths = list_images(Path(args.images))[: args.limit]
    if not paths:
        raise InputError(f"--images {args.images}: no images there")
    given, names = dict(args.artifact), [name for name, _ in args.model]
    if len(set(names)) < len(names) or not given.keys() <= set(names):
        raise InputError(f"--model {', '.join(names)} and --artifact {', '.join(given)}: name each model once")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, weights in args.model:
            artifact = Path(given.get(name, f"{folder}/{name}.onnx"))
            if name not in given:
                run_export(weights, artifact)
            for row in compare(weights, artifact, paths, args):
                rows.append({"model": name} | row)
                print(json.dumps(rows[-1]), flush=True)
    print(markdown(rows))
    if args.json:
        write_json(args.json, {
            "settings": vars(args) | {"json": None}, "rows": rows,
            "versions": versions("torch", "torchvision", "onnxruntime-gpu", *({"openvino"} & {*args.providers})),
        })  # fmt: skip


def compare(weights: str, artifact: Path, paths: Sequence[Path], args: argparse.Namespace) -> Iterator[Row]:
    """A model's rows: its artefact on each provider, in batches of each size."""
    metadata = read_metadata(weights)
    said = read_artifact(artifact)[0]
    chosen = said.model_dump(include={"score_threshold", "nms_iou", "max_detections"})  # nothing of a classifier
    config = [*args.config, *(f"{key}={value}" for key, value in chosen.items())] if args.config else []
    expected = metric_of_weights(weights, metadata, config) if config else {}
    measure: Callable[[OnnxModel, Iterable[Image.Image], Sequence[int]], Parity]
    if isinstance(said, DetectorArtifact):
        detector = load_detector(weights, **chosen)[0].eval()
        measure = partial(measure_detector, remembering(detector) if said.nms else detector)
    else:
        network = create_model(metadata["model"], len(metadata["classes"]), weights).eval()
        measure = partial(measure_classifier, network)
    for provider in args.providers:
        found = metric_of_artifact(artifact, provider, metadata, config) if config else {}
        onnx_model = OnnxModel(artifact, provider)
        for size in args.batch_sizes:
            parity = measure(onnx_model, (decode(path) for path in paths), (size,))
            yield {
                "precision": onnx_model.metadata.precision, "provider": provider, "batch_size": size,
                **parity.model_dump(include={"images", "detections", "unmatched", "largest"}),
                "pytorch": expected, "artifact": found,
            }  # fmt: skip


def remembering(model: Detector) -> Detector:
    """The detector, whose forward now sees each image once: it would be most of the time, over and over."""
    answers: dict[bytes, Any] = {}
    forward = model.forward

    def answer(images: list[Tensor]) -> Any:
        key = hashlib.sha256(images[0].numpy().tobytes()).digest()
        if key not in answers:
            answers[key] = forward(images)
        return answers[key]

    model.forward = answer  # type: ignore[method-assign]
    return model


def metric_of_weights(weights: str, metadata: Mapping[str, Any], config: Sequence[str]) -> dict[str, float]:
    """Top-1, or AP50 of boxes and masks, by the commands that evaluate checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*_overrides(metadata, config, folder), f"weights={weights}"]
        if metadata["task"] == "detection":
            return _metric(detection.evaluate.run_eval(load_config(DetectorConfig, config[0], overrides)))
        return _metric(backbones.evaluate.run_eval(load_config(ClassifierConfig, config[0], overrides)))


def metric_of_artifact(
    artifact: Path, provider: Provider, metadata: Mapping[str, Any], config: Sequence[str]
) -> dict[str, float]:
    """As `metric_of_weights`, by `serving eval`."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = _overrides(metadata, config, folder)
        return _metric(run_eval(config[0], overrides, ArtifactSource(artifact, provider))[0])


def _overrides(metadata: Mapping[str, Any], config: Sequence[str], output: str) -> list[str]:
    preprocess = json.dumps(metadata["preprocess"])
    return [*config[1:], f"model={metadata['model']}", f"preprocess={preprocess}", f"output={output}"]


def _metric(result: Mapping[str, Any]) -> dict[str, float]:
    names = {"top-1": result.get("top1"), "AP50": result.get("AP50"), "mask AP50": result.get("segm", {}).get("AP50")}
    return {name: value for name, value in names.items() if value is not None}


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table; a metric as PyTorch's, the artefact's, and their difference."""
    outputs = [name for name in OUTPUTS if any(name in row["largest"] for row in rows)]
    metrics = [name for name in METRICS if any(name in row["pytorch"] for row in rows)]
    head = ["model", "precision", "provider", "batch", "images", "detections", "unmatched", *outputs, *metrics]

    def cells(row: Row) -> Iterator[str]:
        yield from (str(row[key]) for key in ("model", "precision", "provider", "batch_size", "images"))
        yield from (str(row[key]) for key in ("detections", "unmatched"))
        yield from (f"{row['largest'][name]:.1e}" if name in row["largest"] else "" for name in outputs)
        for name in metrics:
            ours, theirs = row["artifact"].get(name), row["pytorch"].get(name)
            yield "" if ours is None else f"{theirs:.4f}, {ours:.4f}, {ours - theirs:+.1e}"

    return "\n".join(table(head, map(cells, rows)))


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, value


if __name__ == "__main__":
    with exit_on_input_error():
        main()
