"""A float artefact to an INT8 one: the ranges of its activations from training images, what is best kept in float from
a short search, and its accuracy and speed measured against the float one before anything is written; no torch here.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy.typing as npt
import onnx

from backbones.config import ClassifierConfig, load_config
from backbones.errors import InputError
from backbones.files import check_writable, list_images, write_aside
from backbones.layouts import Source
from backbones.progress import progress
from backbones.samples import list_samples
from detection.coco import read_coco
from detection.config import DetectorConfig
from serving import selftest
from serving.artifact import Artifact, ClassifierArtifact, Parity, Quantization, read_whole, write_artifact
from serving.evaluate import ArtifactSource, run_eval
from serving.graph.calibrate import METHODS, Method, Ranges, measure_ranges
from serving.graph.qdq import activations, exclusions, products, quantize
from serving.predictor import Predictor
from serving.runtime import OnnxModel

BATCH_SIZES = (1, 8)  # that speed is measured at
CALIBRATION = 200  # images
ROUNDS = 11  # of them, the two artefacts in turn
CANDIDATE = ".int8.onnx"  # hidden: no cache keeps its graph
NEARLY = 0.9  # of the fastest candidate's speed is fast enough

Inputs = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Candidate:
    """One way to quantize and what came of it: `accuracy` in [0, 1], `speed` in times the float one's."""

    method: Method
    kept: str
    kept_float: int
    accuracy: float
    speed: tuple[float, ...]  # at each of BATCH_SIZES

    def __str__(self) -> str:
        speeds = " ".join(f"{speed:8.2f}" for speed in self.speed)
        return f"{self.method:<10}  {self.kept:<30} {self.kept_float:4d}  {self.accuracy:8.4f}  {speeds}"


def run_quantize(
    model: str | Path,
    output: str | Path,
    config: str,
    overrides: Sequence[str] = (),
    *,
    calibration: str | None = None,
    images: int | None = None,
    method: Method | Literal["auto"] = "auto",
    max_drop: float = 0.5,
    force: bool = False,
) -> Artifact:
    """Write the INT8 artefact that is most accurate among the fast ones, and return what it says about itself.

    Prints a line for each that was tried: first the methods with nothing kept in float, then the best of them with
    more and more kept.

    Args:
        config: of `backbones` or `detection`, as for `serving eval`; accuracy is of the images that it evaluates.
        calibration: a folder of images to choose ranges on; None is the config's training split.
        images: how many of them, evenly spread; None is 200, or all if there are fewer.
        max_drop: points of top-1 or AP50 that may be lost.
        force: write it all the same if it lost more or is not faster.

    Raises:
        InputError: no float artefact, images that are evaluated as well, or a result that is not worth writing.
    """
    if Path(output).suffix != ".onnx":
        raise InputError(f"-o {output}: an artefact's name ends in .onnx")
    if not 0 <= max_drop <= 100:
        raise InputError(f"--max-drop {max_drop}: give points from 0 to 100")
    _, graph, artifact, _ = read_whole(model)
    if Path(output).exists() and Path(output).samefile(model):
        raise InputError(f"-o {output} is the float artefact itself: name another file")
    check_writable(Path(output).parent)
    _check(graph, artifact, model)
    sources, where = calibration_images(config, overrides, artifact, calibration, images)
    graph = onnx.shape_inference.infer_shapes(graph)
    original = ArtifactSource(model, "cpu")
    methods = METHODS if method == "auto" else (method,)
    with tempfile.TemporaryDirectory() as folder:
        scratch = [*overrides, f"output={folder}"]
        metric, before, evaluated = _accuracy(original, config, scratch)
        print(f"ranges from {len(sources)} images of {where}")
        bar = progress(sources, desc="calibrating", unit="image")
        batches = (inputs(original.predictor, source) for source in bar)
        ranges = measure_ranges(graph, activations(graph.graph), batches, methods)
        samples = [inputs(original.predictor, sources[0], size) for size in BATCH_SIZES]
        speeds = "".join(f"  batch {size}" for size in BATCH_SIZES)
        print(f"{'method':<10}  {'kept in float':<30}  nodes  {metric:<7}{speeds}\n{'float':<49} {before:8.4f}")
        float_model = original.predictor.model
        search = _Search(graph, artifact, ranges, float_model, samples, Path(folder) / CANDIDATE, config, scratch)
        found = search.run(methods)
    best = choose(found, before, max_drop)
    reason = problem(best, metric, before, max_drop)
    if reason and not force:
        raise InputError(f"{model} in INT8 {reason}: nothing is written; --force writes it all the same")
    said = Quantization(
        method=best.method, images=len(sources), kept_float=best.kept_float, metric=metric, before=before,
        after=best.accuracy, evaluated=evaluated, speedup=dict(zip(BATCH_SIZES, best.speed, strict=True)),
        forced=bool(reason),
    )  # fmt: skip
    # Parity is of a graph that does what PyTorch does; this one's proof is the figures above.
    made = artifact.model_copy(update={"precision": "int8", "quantization": said, "parity": Parity()})
    with write_aside(output) as aside:
        quantized = search.make(best.method, best.kept)
        write_artifact(quantized, made, aside)
        made = made.model_copy(update={"self_test": selftest.record(OnnxModel(aside, "cpu"))})
        write_artifact(quantized, made, aside)
    return made


def _check(graph: onnx.ModelProto, artifact: Artifact, path: str | Path) -> None:
    if artifact.precision != "fp32":
        raise InputError(f"{path} is {artifact.precision} already: quantize the fp32 artefact that `export` writes")
    if not isinstance(artifact, ClassifierArtifact) and not artifact.nms:
        raise InputError(f"{path} has raw heads, whose accuracy cannot be measured: export without --no-nms")
    if not products(graph.graph):
        raise InputError(f"{path} has no convolution or matrix product with constant weights: there is nothing to gain")


def calibration_images(
    config: str, overrides: Sequence[str], artifact: Artifact, folder: str | None, count: int | None
) -> tuple[list[Source], str]:
    """`count` images, evenly spread over a folder or the config's training split, and what to call it.

    Raises:
        InputError: too few, or some that the config evaluates.
    """
    training, evaluated, where = _splits(config, overrides, artifact, training=folder is None)
    if folder is not None:
        training, where = [*list_images(folder)], folder
    if not training:
        raise InputError(f"{where} has no images to choose ranges on: give a folder that has, as --calibration")
    count = min(CALIBRATION, len(training)) if count is None else count
    if not 0 < count <= len(training):
        raise InputError(f"{where} has {len(training)} images: give --images from 1 to that many, not {count}")
    chosen = [training[i * len(training) // count] for i in range(count)]
    held_out = {_identity(source) for source in evaluated}
    for source in chosen:
        if _identity(source) in held_out:
            raise InputError(
                f"{where} has images that accuracy is measured on, such as {source}: give others as --calibration"
            )
    return chosen, where


def _identity(source: Source) -> object:
    return source.resolve() if isinstance(source, Path) else source


def _splits(
    config: str, overrides: Sequence[str], artifact: Artifact, training: bool
) -> tuple[list[Source], list[Source], str]:
    """The images to train on, if they are asked for, those to evaluate, and what to call the former."""
    if isinstance(artifact, ClassifierArtifact):
        data = load_config(ClassifierConfig, config, overrides).data
        splits = [data.train_split, data.split] if training else [data.split]
        names = len(artifact.classes), artifact.classes
        listed: list[list[Source]] = [[s.source for s in list_samples(data, split, *names)[0]] for split in splits]
        return listed[0], listed[-1], f"{data.root}, split {data.train_split}"
    coco = load_config(DetectorConfig, config, overrides).data
    held_out = read_coco(coco.images, coco.annotations, "data.")
    trained = read_coco(coco.train_images, coco.train_annotations, "data.train_") if training else held_out
    return [r.path for r in trained.records], [r.path for r in held_out.records], str(coco.train_annotations)


def inputs(predictor: Predictor, source: Source, size: int = 1) -> Inputs:
    """What the graph takes for one image, `size` times over, as the predictor would give it.

    Raises:
        ImageError: it cannot be decoded.
    """
    prepared: Any = predictor.prepare(source if isinstance(source, Path) else source.read())
    return predictor.inputs([prepared] * size)


def _accuracy(source: ArtifactSource, config: str, overrides: Sequence[str]) -> tuple[str, float, int]:
    """The metric's name, its value, and how many images it is of."""
    metric = "top1" if isinstance(source.metadata, ClassifierArtifact) else "AP50"
    result = run_eval(config, overrides, source)[0]
    return metric, float(result[metric]), int(result["images"])


class _Search:
    """Candidates of one artefact; each is written to `path`, evaluated, and overwritten by the next."""

    def __init__(
        self,
        graph: onnx.ModelProto,
        artifact: Artifact,
        ranges: Mapping[Method, Ranges],
        float_model: OnnxModel,
        samples: Sequence[Inputs],
        path: Path,
        config: str,
        overrides: Sequence[str],
    ):
        self.graph, self.artifact, self.ranges = graph, artifact, ranges
        self.float_model, self.samples, self.path = float_model, samples, path
        self.config, self.overrides = config, overrides
        self.exclusions = exclusions(graph.graph)
        self.speeds: dict[str, tuple[float, ...]] = {}  # by what is kept: methods differ in constants alone

    def run(self, methods: Sequence[Method]) -> list[Candidate]:
        nothing, *others = self.exclusions
        found = [self.measure(method, nothing) for method in methods]
        best = max(found, key=lambda candidate: candidate.accuracy).method
        return [*found, *(self.measure(best, kept) for kept in others)]

    def measure(self, method: Method, kept: str) -> Candidate:
        write_artifact(self.make(method, kept), self.artifact.model_copy(update={"precision": "int8"}), self.path)
        source = ArtifactSource(self.path, "cpu")
        if kept not in self.speeds:
            self.speeds[kept] = speedup(self.float_model, source.predictor.model, self.samples)
        accuracy = _accuracy(source, self.config, self.overrides)[1]
        candidate = Candidate(method, kept, len(self.exclusions[kept]), accuracy, self.speeds[kept])
        print(candidate)
        return candidate

    def make(self, method: Method, kept: str) -> onnx.ModelProto:
        return quantize(self.graph, self.ranges[method], self.exclusions[kept])


def speedup(slow: OnnxModel, fast: OnnxModel, samples: Sequence[Inputs]) -> tuple[float, ...]:
    """The median of the time of `slow` over that of `fast`, run in turn, on each of the samples."""

    def seconds(model: OnnxModel, sample: Inputs) -> float:
        start = time.perf_counter()
        model.run(**sample)
        return time.perf_counter() - start

    ratios = []
    for sample in samples:
        pairs = [(seconds(slow, sample), seconds(fast, sample)) for _ in range(ROUNDS + 1)][1:]  # the first warms up
        ratios.append(median(one / other for one, other in pairs))
    return tuple(ratios)


def choose(found: Sequence[Candidate], before: float, max_drop: float) -> Candidate:
    """The most accurate of the nearly fastest; if it lost more than it may, the most accurate that is faster than the
    float one, and if there is none, of all. The first of equals.
    """
    faster = [c for c in found if min(c.speed) > 1] or found
    fastest = max(min(candidate.speed) for candidate in faster)
    best = max((c for c in faster if min(c.speed) >= NEARLY * fastest), key=lambda c: c.accuracy)
    if _lost(best, before) <= max_drop:
        return best
    return max(faster, key=lambda c: c.accuracy)


def _lost(candidate: Candidate, before: float) -> float:
    return round(100 * (before - candidate.accuracy), 6)  # points, without float's own noise


def problem(best: Candidate, metric: str, before: float, max_drop: float) -> str:
    """Why the best is not worth writing, in figures; empty if it is."""
    speeds = " and ".join(f"{speed:.2f}" for speed in best.speed)
    sizes = " and ".join(map(str, BATCH_SIZES))
    figures = f"{metric} {before:.4f} to {best.accuracy:.4f}; {speeds} times as fast at batch {sizes}"
    if _lost(best, before) > max_drop:
        return f"loses {_lost(best, before):.2f} points, over --max-drop {max_drop} ({figures})"
    return "" if min(best.speed) > 1 else f"is not faster on this machine ({figures})"
