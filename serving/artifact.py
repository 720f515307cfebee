"""What an artefact says about itself: JSON in the ONNX file's metadata, written by export and read by everyone, and
the seal that shows the file whole; no torch here.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from backbones.errors import InputError
from backbones.preprocess import ClassifierPreprocess, DetectorPreprocess
from backbones.schema import Section

if TYPE_CHECKING:
    import onnx  # below, only where a file is parsed: the client has no use for it

SCHEMA_VERSION = 2  # what `_Artifact.schema_version` says
KEY = "cspnet"
Precision = Literal["fp32", "fp16", "int8"]

# The seal is the file's end: one more entry of ONNX's `metadata_props`, for protobuf takes messages that follow each
# other as one. Its value is the SHA-256 of all bytes before it.
SEAL_KEY = "cspnet_sha256"
_SEAL = b"\x72\x51\x0a\x0d" + SEAL_KEY.encode() + b"\x12\x40"  # tag 14, 81 bytes: key, 13 bytes; value, 64 bytes
_SEAL_SIZE = len(_SEAL) + 64
LARGEST = 2**31 - 1  # bytes
_AGAIN = "copy the file again, or export it again"


class Parity(Section):
    """The largest differences from PyTorch that export measured, over the batch sizes it tried."""

    batch_sizes: tuple[int, ...] = ()
    images: int = 0
    detections: int = 0  # compared, those of PyTorch and of the graph, over all batches
    unmatched: int = 0  # among them: where two overlap and score alike, either may win
    agreement: float | None = None  # share of images whose best class is PyTorch's; None of a detector
    largest: dict[str, float] = Field(
        default_factory=dict
    )  # by output: logits in units of their spread, scores, boxes in pixels


class Quantization(Section):
    """How an artefact became INT8, and what that cost and gave.

    Attributes:
        method: of choosing the ranges of activations.
        images: that they were chosen on.
        kept_float: convolutions and matrix products that were left in float.
        metric: that `before` and `after` are of, such as top1 or AP50, in [0, 1].
        after: of the best of several candidates on the very images that they are compared on, so a little kind.
        evaluated: images that the metric is of.
        speedup: by batch size, the float artefact's time over this one's, on the machine that made it.
        forced: written although it lost more than it might or is not faster.
    """

    method: str
    images: int
    kept_float: int
    metric: str
    before: float
    after: float
    evaluated: int
    speedup: dict[int, float]
    forced: bool = False


class SelfTest(Section):
    """What the artefact answered to a known image, of `serving.selftest`, when it was made.

    Attributes:
        image: its number.
        indices: the best classes, or the classes of the best detections, into `classes`; empty if nothing was found.
        values: their logits, or the detections' scores.
        boxes: of the detections: x1, y1, x2, y2 in pixels of the image.
    """

    image: int
    indices: tuple[int, ...]
    values: tuple[float, ...]
    boxes: tuple[tuple[float, ...], ...] = ()


class _Artifact(Section):
    schema_version: Literal[2] = 2
    model: str
    classes: tuple[str, ...]
    precision: Precision = "fp32"
    opset: int
    gmacs: float  # billions of multiply-adds of one image: of the crop, or on the largest canvas
    weights_sha256: str
    config: dict[str, Any]  # of the training run, without its paths; empty if the weights do not know it
    versions: dict[str, str]
    parity: Parity
    quantization: Quantization | None = None
    self_test: SelfTest | None = None  # none of raw heads, which are no answer yet


class ClassifierArtifact(_Artifact):
    """uint8 `images` [N, H, W, 3] -> `logits` [N, C], `probabilities` [N, C]."""

    task: Literal["classification"] = "classification"
    preprocess: ClassifierPreprocess


class DetectorArtifact(_Artifact):
    """uint8 `images` [N, H, W, 3], int64 `sizes` [N, 2] -> `boxes` [N, K, 4], `scores` [N, K], `labels` [N, K],
    `num_detections` [N]; label i is `classes[i - 1]` and COCO category `category_ids[i - 1]`. With `masks`, also
    `masks` [N, K, 28, 28]. Without `nms`, `boxes` and `scores` of `detection.batched`'s raw heads instead.
    """

    task: Literal["detection"] = "detection"
    preprocess: DetectorPreprocess
    category_ids: tuple[int, ...]
    score_threshold: float
    nms_iou: float
    max_detections: int
    canvases: tuple[tuple[int, int], ...]  # H, W of each that the preprocessing can give
    masks: bool = False
    nms: bool = True

    @model_validator(mode="after")
    def _one_category_a_class(self) -> "DetectorArtifact":
        if len(self.category_ids) != len(self.classes):
            raise ValueError(f"{len(self.classes)} classes have {len(self.category_ids)} category_ids")
        return self


Artifact = ClassifierArtifact | DetectorArtifact
_ADAPTER: TypeAdapter[Artifact] = TypeAdapter(Annotated[Artifact, Field(discriminator="task")])


def to_metadata(artifact: Artifact) -> dict[str, str]:
    """The entries of ONNX's `metadata_props`."""
    return {KEY: artifact.model_dump_json()}


def from_metadata(metadata: Mapping[str, str], path: object) -> Artifact:
    """The inverse of `to_metadata`; `path` is for the message.

    Raises:
        InputError: not exported by this project, or by another version of it whose metadata differ.
    """
    if KEY not in metadata:
        raise InputError(f"{path} carries no cspnet metadata: export it with `python -m serving export`")
    try:
        values = json.loads(metadata[KEY])
        version = values["schema_version"]
        if not isinstance(version, int):
            raise ValueError(f"schema_version is {version!r}")
        if version != SCHEMA_VERSION:
            age, remedy = ("a newer", "update cspnet") if version > SCHEMA_VERSION else ("an older", "export it again")
            raise InputError(f"{path} is of {age} cspnet, metadata version {version}, not {SCHEMA_VERSION}: {remedy}")
        return _ADAPTER.validate_python(values)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{type(error).__name__}: {error}"
        if first:
            reason = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise InputError(f"{path} has broken metadata ({' '.join(reason.split())}): export it again") from None


def write_artifact(graph: "onnx.ModelProto", artifact: Artifact, path: str | Path) -> None:
    """Write a graph with what is said about it, sealed; its own metadata, an older seal among it, are replaced.

    The caller writes aside and renames. The same graph and artefact give the same bytes.
    """
    from onnx import helper

    helper.set_model_props(graph, to_metadata(artifact))
    content = graph.SerializeToString(deterministic=True)
    with open(path, "wb") as file:
        file.write(content)
        file.write(_SEAL + hashlib.sha256(content).hexdigest().encode())


def read_artifact(path: str | Path) -> tuple[Artifact, str]:
    """What an artefact says about itself, and its file's SHA-256, after the file was found whole.

    The graph is parsed but not run, and nothing beside the file is opened. The seal shows accidents and careless
    edits; it is no signature, for whoever edits a file can seal it anew. Run files of people you trust.

    Raises:
        InputError: no artefact, not a whole one, one of another version, or one with data in other files.
    """
    whole = read_whole(path)
    return whole.artifact, whole.sha256


class Whole(NamedTuple):
    """An artefact's file, as it was when it was found whole."""

    content: bytes
    graph: "onnx.ModelProto"
    artifact: Artifact
    sha256: str


def read_whole(path: str | Path) -> Whole:
    """As `read_artifact`, with what was read: to run, for the file may be another by then."""
    content = _read(path)
    body, seal = memoryview(content)[:-_SEAL_SIZE], content[-_SEAL_SIZE:]
    digest = hashlib.sha256(body)
    has_seal = seal.startswith(_SEAL)
    if has_seal and digest.hexdigest().encode() != seal[-64:]:
        sealed = seal[-64:].decode("latin-1")
        raise InputError(f"{path} was changed: its SHA-256 is {digest.hexdigest()}, its seal says {sealed!a}: {_AGAIN}")
    graph = _parse(content, path)
    artifact = from_metadata({entry.key: entry.value for entry in graph.metadata_props}, path)
    if not has_seal:
        raise InputError(f"{path} lost its seal, so it was cut short or changed: {_AGAIN}")
    for location in _external(graph):
        raise InputError(f"{path} keeps data in another file, {location!a}, which is not opened: export it again")
    digest.update(seal)
    return Whole(content, graph, artifact, digest.hexdigest())  # of the whole file, in one pass


def _read(path: str | Path) -> bytes:
    try:
        if Path(path).stat().st_size > LARGEST:
            raise InputError(f"{path} is no artefact: protobuf, and so ONNX in one file, ends at 2 GiB")
        content = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no artefact at {path}: make one with `python -m serving export`") from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): give an .onnx file") from None
    if not content:
        raise InputError(f"{path} is empty: {_AGAIN}")
    return content


def _parse(content: bytes, path: object) -> "onnx.ModelProto":
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    graph = onnx.ModelProto()
    try:
        graph.ParseFromString(content)
    except DecodeError:
        graph.Clear()
    if not graph.ir_version or not graph.graph.output:  # protobuf takes some text and some beginnings of files
        raise InputError(f"{path} is no ONNX file, or only the beginning of one: {_AGAIN}")
    return graph


def _external(message: Any) -> Iterator[str]:
    """Where tensors anywhere in a protobuf message, however deep, have their data outside of it."""
    if message.DESCRIPTOR.name == "TensorProto":
        if message.external_data or message.data_location:  # 0 is in the file
            yield next((entry.value for entry in message.external_data if entry.key == "location"), "")
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:  # one message, or several
                yield from _external(part)
