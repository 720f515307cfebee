"""One number: a data set through checkpoint, artefact, INT8 artefact, endpoint and batch job, side by side.

    checkpoint ──near── artefact ──exact── endpoint
                           │  └────exact── batch job
                          free
                           └── INT8 artefact

On another provider than onnxruntime's CPU, near takes the place of exact. The command fails when two places that must
agree do not, and says at which stage they part.
"""

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from backbones.cspnet import get_variant
from backbones.errors import InputError
from backbones.files import check_writable, versions, write_aside, write_json
from backbones.weights import resolve
from serving.artifact import Artifact
from serving.config import ServedModel, ServingConfig
from serving.evaluate import ArtifactSource, EndpointSource
from serving.export import run_export
from serving.proof.agreement import Bond, Disagreement
from serving.proof.batch import BatchSource
from serving.proof.checkpoint import CheckpointSource
from serving.proof.measure import Scoring, alone, measure_alone, measure_with_children, resolved
from serving.proof.table import HEADER, Proof
from serving.quantize import run_quantize
from serving.serve import start
from serving.sessions.providers import ON_GPU, Provider

METRICS = {"classification": "top1", "detection": "AP50"}
CHECKPOINT, ARTIFACT, INT8 = "checkpoint, PyTorch", "artefact", "INT8 artefact, on the CPU"
ENDPOINT, BATCH = "endpoint, Ray Serve", "batch job, Ray Data"
VERSIONS = ("cspnet", "torch", "torchvision", "onnxruntime-gpu", "ray", "pillow", "numpy")
DATA = "give a config, a folder of classes' folders, or COCO annotations (.json)"
NAME = "model"  # of the artefact, where it is served


def run_prove(
    weights: str,
    data: str,
    overrides: Sequence[str] = (),
    *,
    images: str | None = None,
    model: str | None = None,
    calibration: str | None = None,
    provider: Provider = "auto",
    output: str = "runs/prove",
) -> dict[str, Any]:
    """Measure a data set everywhere, print the table, write it to `<output>/prove.json` and `.md`, and return it.

    Args:
        weights: of a classifier or a detector; as for `export`.
        data: a config of `backbones` or `detection`; or a folder of classes' folders, or of splits of them; or a file
            of COCO annotations.
        overrides: of the config, such as `data.split=test`.
        images: the folder of the annotations' images; None is `images` beside them.
        model: the network's name, for weights that do not say it.
        calibration: a folder of images to choose INT8's ranges on; None is the data's training split.
        provider: of artefacts, endpoint and batch job. The checkpoint is on the GPU if there is one.

    Raises:
        Disagreement: two places part; the table is there all the same.
        InputError: weights or data that are missing or do not fit.
    """
    if not Path(data).exists():
        raise InputError(f"no data at {data}: {DATA}")
    check_writable(output)
    folder, local = Path(output), resolve(weights, get_variant(model)[0] if model else None)
    artifact, int8 = folder / "model.onnx", folder / "model.int8.onnx"
    _say(f"exporting {weights}")
    metadata = run_export(str(local), artifact, model=model)
    config = _config(local, metadata, data, images, folder)
    settings = (*overrides, f"weights={json.dumps(str(local))}", f"output={json.dumps(str(folder / 'eval'))}")
    scoring = Scoring(config, settings, METRICS[metadata.task])
    provider = alone(partial(resolved, artifact, provider))
    proof = Proof(metadata, provider, folder)
    # Elsewhere an answer's last bits depend on the batch that it is found in.
    bond: Bond = "exact" if provider == "cpu" else "near"
    checkpoint, exported = partial(CheckpointSource, local, metadata), partial(ArtifactSource, artifact, provider)

    _say("evaluating the checkpoint")
    proof.places[CHECKPOINT] = measure_alone(scoring, checkpoint)  # what the others are held against
    _say("evaluating the artefact")
    proof.compare(ARTIFACT, measure_alone(scoring, exported), CHECKPOINT, "near", checkpoint, exported)
    without = _quantize(artifact, int8, scoring, calibration)
    if without is None:
        _say("evaluating the INT8 artefact")
        measured = measure_alone(scoring, partial(ArtifactSource, int8, "cpu"))
        proof.compare(INT8, measured, ARTIFACT, "free", exported, exported)
    _say("evaluating the endpoint")
    served = ServedModel(name=NAME, artifact=str(artifact), provider=provider, num_gpus=float(provider in ON_GPU))
    service = ServingConfig(port=0, models=(served,))
    with start(service, lambda _: None) as running:
        endpoint = partial(EndpointSource, f"{running.url}/v2/models/{NAME}")
        proof.compare(ENDPOINT, measure_with_children(scoring, endpoint()), ARTIFACT, bond, exported, endpoint)
    _say("running the batch job")
    job = partial(BatchSource, artifact, provider, metadata, folder / "batch")
    proof.compare(BATCH, measure_with_children(scoring, job()), ARTIFACT, bond, exported, job)
    return _report(proof, scoring, without)


def _config(weights: Path, artifact: Artifact, data: str, images: str | None, folder: Path) -> str:
    """The config that `data` is; or one that says what the weights and `data` say, written to `folder`."""
    if Path(data).suffix in (".yaml", ".yml"):
        if images is not None:
            raise InputError(f"{data} is a config, which says where its images are: give data.images=… for --images")
        return data
    values: dict[str, Any] = {"model": artifact.model, "preprocess": artifact.preprocess.model_dump(mode="json")}
    if Path(data).is_dir():
        if artifact.task == "detection":
            raise InputError(f"{data} is a folder, and {weights} holds a detector: give COCO annotations, or a config")
        values |= {"num_classes": len(artifact.classes), "data": {"root": data}}
    elif Path(data).suffix == ".json":
        if artifact.task == "classification":
            raise InputError(f"{data} is for detectors, and {weights} holds a classifier: give a folder, or a config")
        values["data"] = {"annotations": data, "images": images or str(Path(data).parent / "images")}
    else:
        raise InputError(f"{data} is no data set: {DATA}")
    config = folder / "config.yaml"
    with write_aside(config) as aside:
        aside.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(config)


def _quantize(artifact: Path, int8: Path, scoring: Scoring, calibration: str | None) -> str | None:
    """Make the INT8 artefact, whatever it loses, since the table tells; or say why there is none."""
    _say("quantizing")
    try:
        run_quantize(artifact, int8, scoring.config, scoring.overrides, calibration=calibration, force=True)
    except InputError as error:
        print(f"without an INT8 artefact: {error}", flush=True)
        return str(error)
    return None


def _report(proof: Proof, scoring: Scoring, without_int8: str | None) -> dict[str, Any]:
    lines = [HEADER, *proof.lines()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print("\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines))
    images = len(proof.places[CHECKPOINT].rows)
    result = proof.figures() | {
        "model": proof.metadata.model, "weights_sha256": proof.metadata.weights_sha256, "metric": scoring.metric,
        "images": images, "without_int8": without_int8, "versions": versions(*VERSIONS),
    }  # fmt: skip
    path = proof.folder / "prove.json"
    write_json(path, result)
    with write_aside(path.with_suffix(".md")) as aside:
        rows = [HEADER, ["---"] * len(HEADER), *lines[1:]]
        aside.write_text("".join(f"| {' | '.join(row)} |\n" for row in rows))
    if proof.problems:
        raise Disagreement(f"{'; '.join(proof.problems)}: see {path}")
    print(f"one number on {images} images, {proof.provider}: {path}", flush=True)
    return result


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
