"""An artefact in onnxruntime, behind what `runtime.OnnxModel` asks of a session; no torch here."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime as ort

from backbones.errors import InputError
from serving.artifact import ClassifierArtifact, DetectorArtifact, Whole
from serving.sessions.graph_cache import cache_folders, entry_key, load_or_make, writable_folder
from serving.sessions.placement import NMS_ON_CPU, with_nms_on_cpu
from serving.sessions.providers import NAMES, Provider, missing, ort_providers, why_not_given

_FATAL = 4  # onnxruntime's highest severity


class OrtSession:
    """A session on the provider that was asked for, and nothing less."""

    def __init__(
        self,
        path: Path,
        whole: Whole,
        provider: Provider,
        threads: int,
        cache: bool,
        gpu_mem_limit: int | None,
        cuda_graphs: bool,
    ):
        if reason := missing(provider):
            raise InputError(f"asked for {provider}, but {reason}; or ask for cpu")
        self._threads, self._graphs = threads, CudaGraphs() if cuda_graphs else None
        if provider == "cpu":
            self._session = self._cached(path, whole) if cache else self._open(path, whole.content)
        else:
            ort.preload_dlls()  # the CUDA libraries of the installed wheels
            folder = writable_folder(cache_folders(path)) if cache and provider == "tensorrt" else None
            if folder is not None:  # TensorRT's names say nothing of the weights
                folder /= entry_key("tensorrt", ort.__version__, whole.sha256)
                folder.mkdir(exist_ok=True)
            classifier = isinstance(whole.artifact, ClassifierArtifact)
            half = classifier and whole.artifact.precision == "fp16"
            providers = ort_providers(provider, folder, gpu_mem_limit, cuda_graphs, half)
            content, options = whole.content, session_options(threads)
            if provider == "cuda" and isinstance(whole.artifact, DetectorArtifact) and whole.artifact.nms:
                content = with_nms_on_cpu(content)
                options.add_session_config_entry(*NMS_ON_CPU)
            self._session = self._open(path, content, options, providers)
        self.provider: str = self._session.get_providers()[0]
        if self.provider != NAMES[provider]:
            reason = f"onnxruntime gives {self.provider}: {why_not_given(provider)}"
            raise InputError(f"asked for {provider}, but {reason}; or ask for cpu")
        if provider != "cpu":  # cuDNN's plans that do not fit are called errors at each run; it is of the whole process
            ort.set_default_logger_severity(_FATAL)
        self.inputs = {value.name: (value.type, value.shape) for value in self._session.get_inputs()}
        self.outputs = {value.name: (value.type, value.shape) for value in self._session.get_outputs()}

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The outputs in their order."""
        if self._graphs is not None:
            return self._graphs.run(self._session, inputs)
        outputs: list[npt.NDArray[Any]] = self._session.run(None, dict(inputs))
        return outputs

    def _open(self, path: Path, model: bytes | Path, options: Any = None, providers: Any = None) -> Any:
        options, providers = options or session_options(self._threads), providers or [(NAMES["cpu"], {})]
        try:  # without its fallback, which would go on with other providers, here and after a run that fails
            return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
        except Exception as error:  # onnxruntime's exceptions share no public base
            reason = str(error).splitlines()[0]
            where = providers[0][0].removesuffix("ExecutionProvider")
            raise InputError(
                f"{path} is no graph that onnxruntime loads on {where} ({reason}): export it again"
            ) from None

    def _cached(self, path: Path, whole: Whole) -> Any:
        """A session on the CPU from a graph that was optimised before; without one, it is left for the next."""

        def load(entry: Path) -> Any:
            options = session_options(self._threads)
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.load_model_format", "ORT")
            # Weights are copied out of the mapped file: used where they lie there, not aligned, they cost 8 % of a run.
            options.add_session_config_entry("session.use_memory_mapped_ort_model", "1")
            return self._open(entry, entry, options)

        def make(aside: Path | None) -> Any:
            options = session_options(self._threads)
            if aside is not None:
                options.optimized_model_filepath = str(aside)
                options.add_session_config_entry("session.save_model_format", "ORT")
            return self._open(path, whole.content, options)

        return load_or_make(path, entry_key("onnxruntime", ort.__version__, whole.sha256), load, make)


def session_options(threads: int) -> Any:
    """`SessionOptions` for every provider."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")  # as PyTorch is told, and far faster
    return options


class CudaGraphs:
    """Runs by replaying a CUDA graph for each combination of input shapes, recorded at its first run.

    A replay reads and writes where the recording did, so each combination keeps its buffers on the device, and one run
    at a time uses them. onnxruntime refuses graphs with parts on the CPU, such as a detector's NMS.
    """

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self._bound: dict[tuple[Any, ...], tuple[Any, dict[str, Any], Any]] = {}
        self._lock = threading.Lock()

    def run(self, session: Any, inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The outputs in their order."""
        shapes = tuple((name, value.shape) for name, value in sorted(inputs.items()))
        with self._lock:
            if shapes not in self._bound:
                self._bound[shapes] = self._bind(session, inputs)
            binding, buffers, options = self._bound[shapes]
            for name, value in inputs.items():
                buffers[name].update_inplace(value)
            session.run_with_iobinding(binding, options)
            outputs: list[npt.NDArray[Any]] = binding.copy_outputs_to_cpu()
            return outputs

    def _bind(self, session: Any, inputs: Mapping[str, npt.NDArray[Any]]) -> tuple[Any, dict[str, Any], Any]:
        unrecorded = ort.RunOptions()
        unrecorded.add_run_config_entry("gpu_graph_id", "-1")
        binding = session.io_binding()
        buffers = {}
        for name, value in inputs.items():
            buffers[name] = ort.OrtValue.ortvalue_from_shape_and_type(value.shape, value.dtype, self._device, 0)
            buffers[name].update_inplace(value)
            binding.bind_ortvalue_input(name, buffers[name])
        names = [value.name for value in session.get_outputs()]
        for name in names:
            binding.bind_output(name, self._device)
        session.run_with_iobinding(binding, unrecorded)  # the outputs' sizes are not known before
        for name, output in zip(names, binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(name, output)
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(len(self._bound) + 1))
        return binding, buffers, options
