"""The two packages' metrics on an artefact, on a live endpoint, or on a batch job's results; no torch here.

The data sets and the metric are those of `backbones eval` and `detection eval`; only the predictions come
from elsewhere, so that the figures can be held side by side.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from backbones.config import ClassifierConfig, load_config, read_values
from backbones.errors import InputError
from backbones.files import write_json
from backbones.metrics import Accuracy
from backbones.progress import progress
from backbones.samples import list_samples
from backbones.summary import summary as classifier_summary
from detection.coco import read_coco
from detection.coco_eval import evaluate as coco_figures
from detection.coco_eval import to_results
from detection.config import DetectorConfig
from detection.names import is_detector, without_alias
from detection.summary import summary as detector_summary
from serving.api.schemas import parse_classify, parse_detect
from serving.artifact import Artifact, ClassifierArtifact, DetectorArtifact
from serving.calls import ServerError
from serving.client import Client
from serving.jobs.results import TOP_K, Row, read_results
from serving.jobs.worker import local_file, predict_files
from serving.predictor import Classification, Detections, create_predictor
from serving.runtime import OnnxModel, Provider, usable_cores

BATCH_SIZE = 8
CONNECTIONS = 8


class Source(Protocol):
    """Where predictions come from: `name` for titles and file names, `metadata` of the artefact behind them."""

    name: str
    metadata: Artifact

    def rows(self, paths: Sequence[Path]) -> Iterator[Row]:
        """What became of each image, in the order of `paths`."""
        ...


class ArtifactSource:
    """The artefact itself, run here."""

    def __init__(self, path: str | Path, provider: Provider = "auto"):
        self.name, self.predictor = "artifact", create_predictor(OnnxModel(path, provider))
        self.metadata: Artifact = self.predictor.metadata

    def rows(self, paths: Sequence[Path]) -> Iterator[Row]:
        cores, files = usable_cores(), [local_file(path) for path in paths]
        with ThreadPoolExecutor(cores) as pool:
            for (rows,) in predict_files([self.predictor], files, BATCH_SIZE, pool, cores):
                yield from rows


class EndpointSource:
    """A live endpoint, over several connections at once.

    Args:
        url: of a server, or of one of its models, `http://…/v2/models/NAME`.
        model: which network it has to be, if the server's URL alone is given.
    """

    def __init__(self, url: str, model: str = ""):
        self.name = "endpoint"
        self.url, _, name = url.rstrip("/").partition("/v2/models/")
        with Client(self.url) as client:
            self.model = name or _find_model(client, model)
            self.metadata = client.artifact(self.model)

    def rows(self, paths: Sequence[Path]) -> Iterator[Row]:
        with Client(self.url) as client:
            for path, answer in zip(paths, self._answers(client, paths), strict=True):
                if isinstance(answer, ServerError) and answer.status != 422:
                    raise answer
                if isinstance(answer, InputError):  # the server saw the bytes alone, and cannot name the file
                    yield Row(str(path), None, str(answer))
                else:
                    yield Row(str(path), self._parse(answer))

    def _answers(self, client: Client, paths: Sequence[Path]) -> Iterator[Any]:
        if isinstance(self.metadata, ClassifierArtifact):
            return client.classify_many(self.model, paths, TOP_K, CONNECTIONS, on_error="return")
        return client.detect_many(self.model, paths, None, CONNECTIONS, on_error="return")

    def _parse(self, answer: Any) -> Classification | Detections:
        if isinstance(self.metadata, ClassifierArtifact):
            return parse_classify(answer)
        return parse_detect(answer, self.metadata)


def _find_model(client: Client, network: str) -> str:
    names = list(dict.fromkeys(str(entry["name"]) for entry in client.models()))  # of several versions once
    found = [name for name in names if client.artifact(name).model == without_alias(network)]
    if len(found) != 1:
        raise InputError(
            f"{client.url} serves {len(found)} models of {network} among {', '.join(names)}: "
            f"give one as {client.url}/v2/models/NAME"
        )
    return found[0]


class ResultsSource:
    """What a batch job wrote, in a model's folder. Its paths are below its input, and are matched from the right."""

    def __init__(self, path: str | Path):
        self.name, self.path = "batch", path
        self.metadata, rows = read_results(path)
        self._rows = {row.path: row for row in rows}

    def rows(self, paths: Sequence[Path]) -> Iterator[Row]:
        seen: set[str] = set()
        for path in paths:
            endings = (str(Path(*path.parts[i:])) for i in range(len(path.parts)))
            row = next((self._rows[ending] for ending in endings if ending in self._rows), None)
            if row is None:
                raise InputError(f"{self.path} has no row for {path}: was the job run on this data set?")
            if row.path in seen:
                raise InputError(f"{self.path}: {row.path} fits several images: run the job on a folder above")
            seen.add(row.path)
            yield row


def run_eval(config: str, overrides: Sequence[str], source: Source) -> tuple[dict[str, Any], str]:
    """Score a source on the data set of a config of `backbones` or `detection`.

    Returns:
        What is written to `<output>/eval-<source>.json`, and its summary in a line.

    Raises:
        InputError: a config of another model or protocol, or an image that could not be predicted.
    """
    task = "detection" if is_detector(str(read_values(config, overrides).get("model"))) else "classification"
    _same(task, source.metadata.task, "task")
    if isinstance(source.metadata, ClassifierArtifact):
        classifier = load_config(ClassifierConfig, config, overrides)
        _same(without_alias(classifier.model), source.metadata.model, "model")
        _same(classifier.preprocess, source.metadata.preprocess, "preprocess")
        result, output = _top1(classifier, source, source.metadata), classifier.output
        line = classifier_summary(result)
    else:
        detector = load_config(DetectorConfig, config, overrides)
        _same(without_alias(detector.model), source.metadata.model, "model")
        _same(detector.preprocess, source.metadata.preprocess, "preprocess")
        for name, value in detector.thresholds().items():
            _same(value, getattr(source.metadata, name), name)
        result, output = _ap(detector, source, source.metadata), detector.output
        line = detector_summary(result)
    result |= {
        "source": source.name,
        "precision": source.metadata.precision,
        "artifact": source.metadata.model_dump(mode="json"),
    }
    path = Path(output) / f"eval-{source.name}.json"
    write_json(path, result)
    return result, f"{line}; {path}"


def _same(asked: object, has: object, what: str) -> None:
    if asked != has:
        raise InputError(f"the config's {what} is {asked}, the artefact's is {has}: give the config it was made for")


def _top1(config: ClassifierConfig, source: Source, artifact: ClassifierArtifact) -> dict[str, Any]:
    if config.data.on_error != "stop" or config.data.real_labels is not None:
        raise InputError(
            "data.on_error=skip and data.real_labels are for checkpoints, `backbones eval`: leave them out"
        )
    samples, classes = list_samples(config.data, config.data.split, len(artifact.classes), artifact.classes)
    _same(config.data.decoder, "pillow", "data.decoder")
    paths = [sample.source for sample in samples if isinstance(sample.source, Path)]
    if len(paths) < len(samples):
        raise InputError(f"{samples[0].name} is no file: unpack the data set to evaluate an artefact on it")
    accuracy = Accuracy(classes)
    rows = source.rows(paths)
    for sample, row in zip(samples, _shown(rows, len(samples), source.name), strict=True):
        assert isinstance(row.result, Classification)
        accuracy.update(row.result.indices[None], np.array([sample.target]))
    return accuracy.compute()


def _ap(config: DetectorConfig, source: Source, artifact: DetectorArtifact) -> dict[str, Any]:
    dataset = read_coco(config.data.images, config.data.annotations, "data.", sized=artifact.masks)
    dataset.check_categories(artifact.category_ids, artifact.classes, artifact.model)
    results = []
    rows = source.rows([record.path for record in dataset.records])
    for record, row in zip(dataset.records, _shown(rows, len(dataset.records), source.name), strict=True):
        assert isinstance(row.result, Detections)
        categories = [artifact.category_ids[i] for i in row.result.indices]
        masks = None if row.result.masks is None else list(row.result.masks)
        results += to_results(record.image_id, row.result.boxes, row.result.scores, categories, masks)
    assert config.data.annotations is not None
    write_json(Path(config.output) / f"detections-{source.name}.json", results)
    return coco_figures(config.data.annotations, results, config.metric, artifact.masks)


def _shown(rows: Iterator[Row], total: int, title: str) -> Iterator[Row]:
    """Rows with a progress bar; an image without a result stops the evaluation with its name."""
    for row in progress(rows, total=total, desc=f"evaluating {title}", unit="image"):
        if row.error is not None:
            raise InputError(f"{row.path}: {row.error}")
        yield row
