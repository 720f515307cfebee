"""An artefact ready to run, on the provider that was asked for and nothing less; no torch here."""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from backbones.errors import InputError
from serving.artifact import Artifact, ClassifierArtifact, Whole, read_whole
from serving.sessions.ort import OrtSession
from serving.sessions.providers import ON_GPU, Provider, check_gpu_options, driver_problem, missing, usable_cores

__all__ = ["OnnxModel", "Provider", "SideBySide", "usable_cores"]
_LOG = logging.getLogger(__name__)
_DTYPES = {"tensor(uint8)": "uint8", "tensor(int64)": "int64"}  # of inputs


class _Session(Protocol):
    provider: str
    inputs: dict[str, tuple[str, list[Any]]]
    outputs: dict[str, tuple[str, list[Any]]]

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]: ...


class OnnxModel:
    """An artefact ready to run, by several threads at once.

    Attributes:
        metadata: what the artefact says about itself.
        sha256: of its file.
        provider: onnxruntime's name of the execution provider in use, or `OpenVINO`.
        inputs, outputs: by name, onnxruntime's name of the type and the shape; what is no int is of any size.

    Args:
        path: the `.onnx` file.
        provider: `auto` is TensorRT, CUDA or the CPU, the first that works here. What TensorRT cannot do runs on CUDA.
        threads: of one operator on the CPU; None is one a core that this process may use. Never left to
            OMP_NUM_THREADS, which Ray sets to 1.
        cache: keep optimised graphs, and what TensorRT and OpenVINO compile, for the next start: in $CSPNET_CACHE if
            that is set, else beside the artefact in `<name>.onnx.cache/`, or if that cannot be written in the user's
            cache. An entry is as large as the artefact. On CUDA there is nothing to keep.
        cuda_graphs: record a CUDA graph for each input shape and replay it: less work for the CPU, more memory, for a
            classifier in batches of few sizes.
        gpu_mem_limit: bytes of CUDA's arena.

    Raises:
        InputError: no artefact, not a whole one, or a provider that cannot be had.
    """

    def __init__(
        self,
        path: str | Path,
        provider: Provider = "auto",
        threads: int | None = None,
        cache: bool = True,
        *,
        cuda_graphs: bool = False,
        gpu_mem_limit: int | None = None,
    ):
        check_gpu_options(provider, gpu_mem_limit, cuda_graphs)
        self.path = Path(path)
        whole = read_whole(path)
        self.metadata, self.sha256 = whole.artifact, whole.sha256
        threads = threads or usable_cores()

        def open_session(wanted: Provider) -> _Session:
            if wanted == "openvino":
                return _openvino(self.path, whole, threads, cache)
            return OrtSession(self.path, whole, wanted, threads, cache, gpu_mem_limit, cuda_graphs)

        best = provider == "auto"
        self._session = _best(open_session, _sample(self.metadata)) if best else open_session(provider)
        self.provider, self.inputs, self.outputs = self._session.provider, self._session.inputs, self._session.outputs

    def run(self, **inputs: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """One batch, by the artefact's input and output names.

        Raises:
            InputError: an input of another name, type or shape, or a batch that the runtime fails on.
        """
        self._check(inputs)
        try:
            return dict(zip(self.outputs, self._session.run(inputs), strict=True))
        except Exception as error:  # the runtimes' exceptions share no public base
            shapes = ", ".join(f"{name} {value.shape}" for name, value in inputs.items())
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path} fails on {self.provider} with {shapes}: {reason}") from error

    def _check(self, inputs: Mapping[str, npt.NDArray[Any]]) -> None:
        if inputs.keys() != self.inputs.keys():
            raise InputError(f"{self.path} takes {', '.join(self.inputs)}, not {', '.join(inputs) or 'nothing'}")
        for name, (kind, shape) in self.inputs.items():
            value, sizes = inputs[name], [size if isinstance(size, int) else None for size in shape]
            fits = len(value.shape) == len(sizes) and all(
                has == size or size is None for has, size in zip(value.shape, sizes, strict=True)
            )
            if value.dtype != _DTYPES[kind] or not fits:
                wanted = f"{_DTYPES[kind]} [{', '.join('any' if size is None else str(size) for size in sizes)}]"
                raise InputError(f"{self.path} takes {name} as {wanted}, not {value.dtype} {list(value.shape)}")


class SideBySide(OnnxModel):
    """A model for a thread a core: a lone run has all cores, runs beside others have one each.

    The threads of an operator wait for the slowest of them, operator after operator; runs of one thread each never do.
    Both give the same bits.

    Args:
        wide: runs on all cores; this is it, and shares its session.
        narrow: of the same artefact, runs on one.

    Raises:
        InputError: the file was another by the time that `narrow` was opened.
    """

    def __init__(self, wide: OnnxModel, narrow: OnnxModel):
        if narrow.sha256 != wide.sha256:
            raise InputError(f"{narrow.path} was replaced while it was opened: start again")
        vars(self).update(vars(wide))
        self._narrow = narrow
        self._running, self._lock = 0, threading.Lock()

    def run(self, **inputs: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """As `OnnxModel.run`."""
        with self._lock:
            self._running += 1
            alone = self._running == 1
        try:
            return super().run(**inputs) if alone else self._narrow.run(**inputs)
        finally:
            with self._lock:
                self._running -= 1


def _sample(artifact: Artifact) -> dict[str, npt.NDArray[Any]]:
    """A batch of one black image."""
    if isinstance(artifact, ClassifierArtifact):
        crop = artifact.preprocess.crop
        return {"images": np.zeros((1, crop, crop, 3), np.uint8)}
    canvas = artifact.canvases[0]
    return {"images": np.zeros((1, *canvas, 3), np.uint8), "sizes": np.array([canvas])}


def _best(open_session: Callable[[Provider], _Session], sample: Mapping[str, npt.NDArray[Any]]) -> _Session:
    """The session of the best provider that runs the sample here. The log says which, and why not a better one."""
    nearly = not driver_problem()  # a GPU that is not used is worth a warning
    for wanted in ON_GPU:
        try:
            session = open_session(wanted)
            session.run(sample)  # TensorRT builds its engine here, and may fail at it
        except Exception as error:  # the runtimes' exceptions share no public base
            _LOG.log(logging.WARNING if nearly else logging.INFO, "auto: %s", error)
        else:
            break
    else:
        session = open_session("cpu")
    _LOG.info("auto: %s", session.provider)
    return session


def _openvino(path: Path, whole: Whole, threads: int, cache: bool) -> _Session:
    if reason := missing("openvino"):
        raise InputError(f"asked for openvino, but {reason}; or ask for cpu")
    from serving.sessions.openvino import OpenVinoSession  # the package is optional

    return OpenVinoSession(path, whole.content, whole.sha256, threads, cache)
