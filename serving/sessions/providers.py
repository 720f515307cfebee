"""What an artefact can be run on, what of it this machine has, and onnxruntime's settings for it; no torch here.

onnxruntime itself is imported only where it is asked, for the command line takes its choices from here.
"""

import ctypes
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Literal, get_args

from backbones.errors import InputError

Provider = Literal["auto", "cpu", "cuda", "tensorrt", "openvino"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
ON_GPU: tuple[Provider, ...] = ("tensorrt", "cuda")  # best first
NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

_WINDOWS = sys.platform == "win32"
_DRIVER = "nvcuda.dll" if _WINDOWS else "libcuda.so.1"
_TENSORRT = "nvinfer_10.dll" if _WINDOWS else "libnvinfer.so.10"
# TensorRT has no kernel for these, or one whose number of outputs the graph does not expect.
_NOT_IN_TENSORRT = "NonMaxSuppression,NonZero,RoiAlign"
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of CPU time, and in how many
_CUDA_WHEELS = "pip install 'onnxruntime-gpu[cuda,cudnn]'"


def usable_cores() -> int:
    """Cores that this process may use: of its affinity, and of its container's share of CPU time, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA.read_text().split()
        return min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no control groups here, or "max" as the quota
        return cores


def check_gpu_options(provider: Provider, gpu_mem_limit: int | None, cuda_graphs: bool) -> None:
    """Refuse what a provider has no use for.

    Raises:
        InputError: naming it and the remedy.
    """
    if cuda_graphs and provider != "cuda":
        raise InputError(f"cuda_graphs does not go with provider {provider}: ask for cuda, or leave it out")
    if gpu_mem_limit is not None and provider not in ON_GPU:
        raise InputError(f"gpu_mem_limit does not go with provider {provider}: ask for cuda, or leave it out")


def missing(provider: Provider) -> str | None:
    """What a provider lacks on this machine and the remedy, in a line; None where nothing is seen to be missing.

    onnxruntime lists the providers that it was built with, present or not, and so cannot be asked.
    """
    if provider == "openvino":
        found = importlib.util.find_spec("openvino")
        return None if found else "the package openvino is not installed: pip install 'cspnet[openvino]'"
    if provider in ("auto", "cpu"):
        return None
    import onnxruntime as ort

    if NAMES[provider] not in ort.get_available_providers():
        return f"this onnxruntime was built without {NAMES[provider]}: pip install onnxruntime-gpu in its place"
    if provider == "tensorrt" and not driver_problem() and (error := _load(_TENSORRT)):
        return f"TensorRT's library does not load ({error}): install TensorRT 10 where the loader looks for libraries"
    return driver_problem()


def driver_problem() -> str | None:
    """Why the driver shows no CUDA device, and the remedy; None if it shows one."""
    if error := _load(_DRIVER):
        return f"the NVIDIA driver's library does not load ({error}): install the driver"
    driver = ctypes.CDLL(_DRIVER)
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count.value:
        return "the NVIDIA driver shows no device: is there a GPU, and does CUDA_VISIBLE_DEVICES name it?"
    return None


def why_not_given(provider: Provider) -> str:
    """What kept onnxruntime from a provider that nothing seemed to be missing for, and the remedy.

    To be asked only after onnxruntime has tried: the first to open a provider's library starts it.
    """
    import onnxruntime as ort

    name = f"onnxruntime_providers_{provider}"
    folder = Path(ort.__file__).parent / "capi"
    error = _load(str(folder / (f"{name}.dll" if _WINDOWS else f"lib{name}.so")))
    remedy = _CUDA_WHEELS if provider == "cuda" else "install TensorRT 10 where the loader looks for libraries"
    return f"{error}: {remedy}" if error else "onnxruntime does not say why; see what it writes to stderr"


def _load(library: str) -> str | None:
    """The loader's words if a library, or one that it needs, cannot be loaded."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None


def ort_providers(
    provider: Provider, cache: Path | None, gpu_mem_limit: int | None, cuda_graphs: bool, half: bool
) -> list[tuple[str, dict[str, str]]]:
    """onnxruntime's `providers`, first choice first. TensorRT leaves to CUDA what it cannot do; both to the CPU.

    Args:
        cache: the folder for TensorRT's engines; None keeps none.
        gpu_mem_limit: bytes of CUDA's arena; None is all there is.
        half: whether convolutions are in float16, for which Tensor Cores want the channels last.
    """
    if provider == "cpu":
        return [(NAMES["cpu"], {})]
    cuda = {
        "arena_extend_strategy": "kSameAsRequested",  # not to the next power of two
        "cudnn_conv_algo_search": "HEURISTIC",  # a new shape does not wait for an exhaustive search
        "use_tf32": "0",  # it would move the figures
    }
    if half:
        cuda["prefer_nhwc"] = "1"
    if gpu_mem_limit is not None:
        cuda["gpu_mem_limit"] = str(gpu_mem_limit)
    if cuda_graphs:
        cuda["enable_cuda_graph"] = "1"
    providers: list[tuple[str, dict[str, str]]] = [(NAMES["cuda"], cuda)]
    if provider == "tensorrt":
        tensorrt = {"trt_op_types_to_exclude": _NOT_IN_TENSORRT}
        if cache is not None:  # a new engine takes minutes
            tensorrt |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(cache)}
            tensorrt |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": str(cache)}
        providers.insert(0, (NAMES["tensorrt"], tensorrt))
    return providers
