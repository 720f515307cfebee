"""An artefact on OpenVINO's CPU plugin, behind what `runtime.OnnxModel` asks of a session; no torch here."""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov  # type: ignore[import-untyped]

from backbones.errors import InputError
from serving.sessions.graph_cache import entry_key, load_or_make

_TYPES = {"u8": "tensor(uint8)", "i64": "tensor(int64)", "f32": "tensor(float)"}


@functools.cache
def _core() -> Any:
    """One for the process: with its last model a core unloads its plugin, whose threads may still run."""
    return ov.Core()


def compile_model(model: Any, threads: int) -> Any:
    """What OpenVINO's `read_model` or `convert_model` gave, or the path of a file, for the CPU."""
    return _core().compile_model(model, "CPU", _config(threads))


def _config(threads: int) -> dict[str, Any]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # bfloat16 otherwise, where the CPU has it
        "INFERENCE_NUM_THREADS": threads,
        # Else it takes over the mode of the thread that calls. Where onnxruntime or PyTorch have set that to
        # denormals are zero, small integers, moved as if they were floats, become 0: labels, for one.
        "CPU_DENORMALS_OPTIMIZATION": False,
    }


class OpenVinoSession:
    """One compiled model for all shapes; each thread that runs it gets a request of its own."""

    def __init__(self, path: Path, content: bytes, sha256: str, threads: int, cache: bool):
        def load(entry: Path) -> Any:
            with _one_line(entry, "imports"):
                self._mapped = np.memmap(entry, np.uint8, "c")  # the model's weights stay there; "r" is refused
                return _core().import_model(ov.Tensor(self._mapped, shared_memory=True), "CPU", _config(threads))

        def make(aside: Path | None) -> Any:
            with _one_line(path, "compiles"):
                model = compile_model(_core().read_model(content), threads)
            if aside is not None:
                aside.write_bytes(model.export_model().getbuffer())
            return model

        # Not OpenVINO's own cache (CACHE_DIR), which takes an entry with damaged weights.
        key = entry_key("openvino", ov.__version__, sha256)
        self._model = load_or_make(path, key, load, make) if cache else make(None)
        self.provider = "OpenVINO"
        self.inputs = {port.any_name: _describe(port) for port in self._model.inputs}
        self.outputs = {port.any_name: _describe(port) for port in self._model.outputs}
        self._local = threading.local()

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The outputs in their order."""
        if not hasattr(self._local, "request"):
            self._local.request = self._model.create_infer_request()
        found = self._local.request.infer({name: np.ascontiguousarray(value) for name, value in inputs.items()})
        return [found[port] for port in self._model.outputs]


def _describe(port: Any) -> tuple[str, list[Any]]:
    shape = [size.get_length() if size.is_static else None for size in port.get_partial_shape()]
    return _TYPES[port.element_type.get_type_name()], shape


@contextlib.contextmanager
def _one_line(path: Path, does: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
        # The last line says why; those before say where in OpenVINO.
        raise InputError(f"{path} is no graph that OpenVINO {does} ({lines[-1]}): export it again") from None
