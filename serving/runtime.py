"""An onnxruntime session on the provider that was asked for, and nothing less; no torch here."""

import ctypes
import os
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
import onnxruntime as ort

from backbones.errors import InputError
from serving.artifact import from_metadata

Provider = Literal["auto", "cpu", "cuda"]
_NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cuda_devices() -> int:
    """CUDA devices that the driver shows. onnxruntime lists its CUDA provider without any, so it cannot be asked."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


class OnnxModel:
    """An artefact ready to run.

    Attributes:
        metadata: what the artefact says about itself.
        provider: onnxruntime's name of the execution provider in use.

    Args:
        path: the `.onnx` file.
        provider: `auto` is CUDA where the driver shows a device, else the CPU.
        threads: of one operator on the CPU; None is one a core that this process may use. Never left to
            OMP_NUM_THREADS, which Ray sets to 1.

    Raises:
        InputError: no file, no artefact of this project, or a provider that cannot be had.
    """

    def __init__(self, path: str | Path, provider: Provider = "auto", threads: int | None = None):
        if not Path(path).is_file():
            raise InputError(f"no artefact at {path}: make one with `python -m serving export`")
        wanted = ("cuda" if cuda_devices() else "cpu") if provider == "auto" else provider
        if wanted == "cuda":
            ort.preload_dlls()  # the CUDA libraries of the installed wheels
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")  # as PyTorch is told, and far faster
        try:
            self._session = ort.InferenceSession(str(path), options, providers=[_provider(wanted)])
        except Exception as error:  # onnxruntime's exceptions share no public base
            reason = str(error).splitlines()[0]
            raise InputError(f"{path} is no ONNX file that onnxruntime loads ({reason}): export it again") from None
        self.path = Path(path)
        self.provider: str = self._session.get_providers()[0]
        if self.provider != _NAMES[wanted]:
            raise InputError(
                f"asked for {_NAMES[wanted]} but onnxruntime gives {self.provider}: install the CUDA libraries and "
                "driver that onnxruntime-gpu needs, or set provider to cpu"
            )
        self.metadata = from_metadata(self._session.get_modelmeta().custom_metadata_map, path)
        self.inputs = {value.name: (value.type, value.shape) for value in self._session.get_inputs()}
        self.outputs = {value.name: (value.type, value.shape) for value in self._session.get_outputs()}

    def run(self, **inputs: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """One batch, by the artefact's input and output names."""
        return dict(zip(self.outputs, self._session.run(None, inputs), strict=True))


def _provider(wanted: str) -> Any:
    if wanted == "cpu":
        return _NAMES["cpu"]
    options = {
        "arena_extend_strategy": "kSameAsRequested",  # not to the next power of two
        "cudnn_conv_algo_search": "HEURISTIC",  # a new shape does not wait for an exhaustive search
        "use_tf32": "0",  # it would move the figures
    }
    return (_NAMES["cuda"], options)
