"""Networks on the runtimes without this project: as torch.onnx.export and openvino.convert_model take them.

A network that cannot be converted, or answers something else than PyTorch afterwards, is no contestant: the reason
stands in the place of its speed.
"""

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor, nn

from benchmarks.contest import table
from benchmarks.detection import agreement
from detection.families import Detector
from serving.runtime import usable_cores
from serving.sessions.ort import session_options

Run = Callable[[Tensor], list[npt.NDArray[Any]]]  # float [N, 3, H, W] -> outputs
Convert = Callable[[nn.Module, Tensor, Path], Run]  # network, example, the ONNX file to write
MOST = 0.02  # that answers may be off
SHOWN = 120  # characters of a reason


class Differs(Exception):
    """A converted network's answers are not PyTorch's."""


class Flat(nn.Module):
    """A torchvision detector over a batch [N, 3, H, W] that returns tensors, an image's after the other's: dictionaries
    cannot be traced.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for found in self.model(list(images)) for value in found.values())


def conversions(
    model: nn.Module, feed: Callable[[Tensor], Tensor], images: Tensor, path: Path
) -> tuple[dict[str, Callable[[], int]], list[dict[str, Any]]]:
    """The conversions that take part in a race, and a row each of those that were tried.

    Args:
        model: a classifier of float [N, 3, H, W], or a torchvision detector.
        feed: uint8 [N, H, W, 3] to what the model takes, float [N, 3, H, W]; a part of each turn.
        images: of a turn, uint8 [N, H, W, 3].
        path: of the ONNX file to write.
    """
    entries: dict[str, Callable[[], int]] = {}
    rows = []
    for way, (name, convert) in WAYS.items():
        if name in entries or (name == ONNX and len(images) > 1):
            continue
        row: dict[str, Any] = {"way": way, "batch": len(images)}
        start = time.perf_counter()
        try:
            with quietly(), torch.no_grad():
                run = convert(model, feed(images), path)
            row["seconds"] = time.perf_counter() - start
            row["off"] = compare(model, run, feed(images))
            entries[name] = turn(run, feed, images)
        except Exception as error:  # what exporters raise has no common base
            row["problem"] = reason(error)
        rows.append(row)
    return entries, rows


def turn(run: Run, feed: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], int]:
    @torch.inference_mode()
    def work() -> int:
        run(feed(images))
        return len(images)

    return work


def to_onnx(model: nn.Module, example: Tensor, path: Path, *, dynamo: bool) -> Run:
    """Exported and run by onnxruntime; of a detector one image."""
    inputs = ([*example],) if isinstance(model, Detector) else (example,)
    torch.onnx.export(model, inputs, path, dynamo=dynamo, verbose=False, external_data=False)
    return in_onnxruntime(path)


def to_openvino(model: nn.Module, example: Tensor, path: Path) -> Run:
    """Converted, and run by OpenVINO as the artefacts are."""
    import openvino as ov  # type: ignore[import-untyped]  # the package is optional, to those who import this module

    flat = Flat(model).eval() if isinstance(model, Detector) else model
    return in_openvino(ov.convert_model(flat, example_input=example))


ONNX = "plain ONNX"
WAYS: dict[str, tuple[str, Convert]] = {  # the second where the first fails: PyTorch calls it deprecated
    "torch.onnx.export": (ONNX, partial(to_onnx, dynamo=True)),
    "torch.onnx.export, dynamo=False": (ONNX, partial(to_onnx, dynamo=False)),
    "openvino.convert_model": ("plain OpenVINO", to_openvino),
}


def in_onnxruntime(path: Path) -> Run:
    session = ort.InferenceSession(path, session_options(usable_cores()), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    single = len(entry.shape) == 3  # a detector's one image

    def run(images: Tensor) -> list[npt.NDArray[Any]]:
        found: list[npt.NDArray[Any]] = session.run(None, {entry.name: as_array(images[0] if single else images)})
        return found

    return run


def in_openvino(model: Any) -> Run:
    """Of what OpenVINO's `convert_model` gives, or the path of an ONNX file."""
    from serving.sessions.openvino import compile_model

    compiled = compile_model(model, usable_cores())
    request = compiled.create_infer_request()

    def run(images: Tensor) -> list[npt.NDArray[Any]]:
        found = request.infer([as_array(images)])
        return [found[port] for port in compiled.outputs]

    return run


def as_array(images: Tensor) -> npt.NDArray[Any]:
    return images.contiguous().numpy()


@torch.inference_mode()
def compare(model: nn.Module, run: Run, images: Tensor) -> float:
    """How far answers are from PyTorch's: of a classifier the largest difference over the spread of the outputs, of a
    detector the share of detections that only one of the two has.

    Raises:
        Differs: by more than MOST.
    """
    found = [torch.from_numpy(np.array(value)) for value in run(images)]
    if isinstance(model, Detector):
        expected = model(list(images))
        names = list(expected[0])
        counts = agreement(
            [dict(zip(names, found[i : i + len(names)], strict=True)) for i in range(0, len(found), len(names))],
            expected,
        )
        off = 1 - counts["shared"] / max(counts["detections"], 1)
    else:
        logits = model(images)
        off = float((found[0] - logits).abs().max() / (logits.max() - logits.min()))
    if off > MOST:
        raise Differs(f"answers are {off:.0%} off PyTorch's")
    return off


def reason(error: BaseException) -> str:
    """What was the matter in the first place, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    line = line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"
    return f"{type(error).__name__}: {line}"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the exporters' remarks, which are whole graphs where they fail."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def markdown(rows: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
    """A line a model and conversion."""
    lines = []
    for name, row in rows:
        seconds, off = (f"{row[key]:.{digits}g}" if key in row else "" for key, digits in (("seconds", 3), ("off", 1)))
        lines.append([name, str(row["batch"]), row["way"], seconds, off or row["problem"].replace("|", r"\|")])
    return table(["model", "batch", "conversion", "s", "off, or the reason why not"], lines)
