"""Artefacts against PyTorch, OpenVINO and plain conversions, and INT8 against float, on this machine's CPU.

    python -m benchmarks.export [--models cspresnet50 …] [--batch-sizes 1 8] [--rounds 5] [--json FILE]

Side by side in one run: in every round each contestant has its turn on the same uint8 pixels in memory, and the ratios
are medians over the rounds. PyTorch runs channels_last, as it is fastest, on as many threads as onnxruntime;
torch.compile has the weights frozen into the code, for the same reason. Detectors are compared with torchvision's own
forward, and their compiled form is `detection.batched`, which can be compiled. The weights are random, made to find
objects, and INT8 is of every operator that `serving quantize` may take. The limit is the arithmetic: the last column
is the artefact's share of the GFLOP/s that a large matrix product reached in the same run. A second table says which
operators the artefact's time goes to, by onnxruntime's profile.

"plain ONNX" is the same network, or torchvision's detector, as torch.onnx.export takes it at batch 1, in onnxruntime;
"plain OpenVINO" as openvino.convert_model takes it. They get the pixels as floats, which their turns make. A third
table says how each conversion went, and where there is none, why. Those of detectors take minutes at batch 8.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from backbones.cli import at_least
from backbones.cspnet import create_model
from backbones.engine import normalize
from backbones.errors import exit_on_input_error
from backbones.files import versions, write_json
from backbones.labels import class_names
from backbones.preprocess import DetectorPreprocess
from backbones.published import protocol
from backbones.weights import save_weights
from benchmarks import plain
from benchmarks.contest import excite, ratio, table, take_turns
from detection.batched import BatchedDetector
from detection.models import create_detector
from detection.names import is_detector
from serving.artifact import read_whole, write_artifact
from serving.export import ExportedClassifier, run_export
from serving.graph.calibrate import measure_ranges
from serving.graph.qdq import activations, quantize
from serving.runtime import OnnxModel, usable_cores
from serving.sessions.ort import session_options

MODELS = (
    "cspresnet50", "cspresnext50", "cspdarknet50",
    "retinanet_cspresnet50_fpn", "fcos_cspresnet50_fpn", "fasterrcnn_cspresnet50_fpn",
)  # fmt: skip
CANVAS = (256, 384)  # of the detectors, pixels
NUM_CLASSES = 91
TOO_LONG_S = 20  # for a batch of torch.compile's code: FCOS' took minutes where onnxruntime took a second
SHOWN = 4  # kinds of operators, of those that take most time
Work = Callable[[], int]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch-sizes", nargs="+", type=at_least(1), default=(1, 8))
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain conversions out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(usable_cores())
    result: dict[str, Any] = {
        "threads": usable_cores(), "settings": vars(args) | {"json": None}, "gflops": matrix_product(),
        "versions": versions("torch", "torchvision", "onnxruntime-gpu", "openvino"), "models": {},
    }  # fmt: skip
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            result["models"][name] = race(name, args, Path(folder))
        print(json.dumps({name: result["models"][name]}, indent=1), flush=True)
    print(markdown(result))
    if args.json:
        write_json(args.json, result)


def matrix_product(size: int = 2048, rounds: int = 5) -> float:
    """GFLOP/s of a float32 product of two square matrices."""
    a, seconds = torch.rand(size, size), []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:]) / 1e9


def race(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All contestants at each batch size, and how long the export took."""
    torch.manual_seed(0)
    weights, artifact = folder / "weights.safetensors", folder / "float.onnx"
    detector = is_detector(name)
    model, pixels = random_detector(name, weights) if detector else random_classifier(name, weights)
    start = time.perf_counter()
    said = run_export(str(weights), artifact)
    figures: dict[str, Any] = {"export_s": time.perf_counter() - start, "gmacs": said.gmacs, "batches": {}, "plain": []}
    sample = {"images": pixels.numpy()} | ({"sizes": np.array([CANVAS])} if detector else {})
    int8 = quantized(artifact, sample)
    figures["operators"] = {title: shares(path, sample) for title, path in (("float", artifact), ("INT8", int8))}
    sessions = {
        "onnxruntime": OnnxModel(artifact, "cpu", cache=False),
        "OpenVINO": OnnxModel(artifact, "openvino", cache=False),
        "INT8": OnnxModel(int8, "cpu", cache=False),
    }
    narrow = OnnxModel(artifact, "cpu", threads=1, cache=False)
    compile_too = not args.no_compile
    for size in args.batch_sizes:
        images = pixels.expand(size, -1, -1, -1).contiguous()
        inputs = {key: np.repeat(value, size, axis=0) for key, value in sample.items()}
        contestants = {key: in_session(session, inputs) for key, session in sessions.items()}
        torch._dynamo.reset()
        contestants |= (detectors if detector else classifiers)(model, images, compile_too)
        compile_too = "compiled" in contestants
        if not args.no_plain:
            entries, rows = plain.conversions(*unexported(model), images, folder / "plain.onnx")
            contestants |= entries
            figures["plain"] += rows
        with ThreadPoolExecutor(usable_cores()) as pool:
            if size > 1:
                contestants["a core an image"] = core_an_image(narrow, inputs, pool)
            figures["batches"][size] = take_turns(contestants, args.rounds)
    return figures


def quantized(artifact: Path, sample: dict[str, Any]) -> Path:
    """The artefact in INT8, its ranges those of one input: for its speed."""
    _, graph, said, _ = read_whole(artifact)
    graph = onnx.shape_inference.infer_shapes(graph)
    ranges = measure_ranges(graph, activations(graph.graph), [sample], ["minmax"])["minmax"]
    path = artifact.with_name("int8.onnx")
    write_artifact(quantize(graph, ranges, set()), said.model_copy(update={"precision": "int8"}), path)
    return path


def shares(artifact: Path, inputs: dict[str, Any], runs: int = 5) -> dict[str, float]:
    """Each kind of operator's share of the time in operators, the largest first: of the graph as onnxruntime runs it,
    which has fused some and writes INT8 as QLinearConv and the like.
    """
    options = session_options(usable_cores())
    options.enable_profiling, options.profile_file_prefix = True, str(artifact.with_suffix(".profile"))
    session = ort.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
    for _ in range(runs):
        session.run(None, inputs)
    spent: Counter[str] = Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return {name: time_ / spent.total() for name, time_ in spent.most_common()}


def random_classifier(name: str, path: Path) -> tuple[nn.Module, Tensor]:
    """A network, and uint8 pixels [1, H, W, 3]; its weights are saved."""
    model, preprocess = create_model(name), protocol(name)
    metadata = {"task": "classification", "model": name, "classes": class_names(1000)}
    save_weights(path, model, metadata | {"preprocess": preprocess.model_dump(), "config": {}})

    exported = ExportedClassifier(model, preprocess).eval()
    return exported.to(memory_format=torch.channels_last), blots(preprocess.crop, preprocess.crop)


def random_detector(name: str, path: Path, canvas: tuple[int, int] = CANVAS) -> tuple[nn.Module, Tensor]:
    """The same of a detector that finds objects in the pixels."""
    preprocess = DetectorPreprocess(min_size=min(canvas), max_size=max(canvas))
    model, pixels = create_detector(name, NUM_CLASSES, preprocess=preprocess), blots(*canvas)
    excite(model, as_list(pixels))
    ids = list(range(1, NUM_CLASSES))
    metadata = {"task": "detection", "model": name, "detector": model.spec.model_dump(), "category_ids": ids}
    metadata |= {"classes": [f"class {i}" for i in ids], "preprocess": preprocess.model_dump(), "config": {}}
    save_weights(path, model, metadata)
    return model.eval().to(memory_format=torch.channels_last), pixels


def blots(height: int, width: int) -> Tensor:
    """Smooth uint8 noise [1, H, W, 3]."""
    noise = nn.functional.interpolate(torch.rand(1, 3, 24, 24), (height, width), mode="bilinear")
    return noise.mul(255).byte().permute(0, 2, 3, 1)


def as_list(images: Tensor) -> list[Tensor]:
    return [image.permute(2, 0, 1).float() / 255 for image in images]


def unexported(model: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The network without what an export adds, and uint8 [N, H, W, 3] as it takes them, float [N, 3, H, W]."""
    if isinstance(model, ExportedClassifier):
        return model.model, partial(normalize, preprocess=model.preprocess)
    return model, lambda images: torch.stack(as_list(images))


def in_session(session: OnnxModel, inputs: dict[str, Any]) -> Work:
    def work() -> int:
        session.run(**inputs)
        return len(inputs["images"])

    return work


def core_an_image(session: OnnxModel, inputs: dict[str, Any], pool: Executor) -> Work:
    def work() -> int:
        count = len(inputs["images"])
        alone = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(count)]
        return len(list(pool.map(lambda image: session.run(**image), alone)))

    return work


def classifiers(model: nn.Module, images: Tensor, compile_too: bool) -> dict[str, Work]:
    return {"eager": in_torch(model, images)} | compiled(model, (images,), compile_too)


def detectors(model: nn.Module, images: Tensor, compile_too: bool) -> dict[str, Work]:
    sizes = torch.tensor([CANVAS] * len(images))
    return {"eager": in_torch(lambda x: model(as_list(x)), images)} | compiled(
        BatchedDetector(model), (images, sizes), compile_too
    )


def in_torch(forward: Callable[..., object], *inputs: Tensor) -> Work:
    @torch.inference_mode()
    def work() -> int:
        forward(*inputs)
        return len(inputs[0])

    return work


def compiled(model: nn.Module, inputs: tuple[Tensor, ...], compile_too: bool) -> dict[str, Work]:
    """By torch.compile, compiled here; without it where its code takes longer than TOO_LONG_S for a batch."""
    if not compile_too:
        return {}
    work = in_torch(compile_frozen(model, *inputs), *inputs)
    start = time.perf_counter()
    work()
    if (seconds := time.perf_counter() - start) > TOO_LONG_S:
        print(f"torch.compile's code takes {seconds:.0f} s for a batch of {len(inputs[0])} and is left out", flush=True)
        return {}
    return {"compiled": work}


def compile_frozen(model: nn.Module, *inputs: Tensor) -> Callable[..., object]:
    """By torch.compile for inputs of this shape, with the weights frozen into the code."""
    several = torch._dynamo.config.patch(recompile_limit=64)  # else the ninth of one class would run as it is
    # In inference mode as it will run, or it would be compiled again then.
    with torch._inductor.config.patch(freezing=True), several, torch.inference_mode():
        forward: Callable[..., object] = torch.compile(model, dynamic=False)
        forward(*inputs)
    return forward


def markdown(result: dict[str, Any]) -> str:
    """The speed of the artefact over each other contestant's, with the spread; below it, where the time goes, and how
    the plain conversions went.
    """
    batches = [turns for figures in result["models"].values() for turns in figures["batches"].values()]
    others = list(dict.fromkeys(name for turns in batches for name in turns["ours_over"]))
    head = ["model", "batch", "images/s", *(f"/ {name}" for name in others), "of the matrix product"]
    lines = []
    for name, figures in result["models"].items():
        for size, turns in figures["batches"].items():
            speed = turns["images_per_s"]["onnxruntime"]
            share = 2 * figures["gmacs"] * speed / result["gflops"]
            lines.append([name, str(size), f"{speed:.2f}", *(ratio(turns, other) for other in others), f"{share:.0%}"])
    operators = [
        [name, precision, ", ".join(f"{kind} {share:.0%}" for kind, share in list(found.items())[:SHOWN])]
        for name, figures in result["models"].items()
        for precision, found in figures["operators"].items()
    ]
    converted = [(name, row) for name, figures in result["models"].items() for row in figures["plain"]]
    below = ["", *plain.markdown(converted)] if converted else []
    return "\n".join([*table(head, lines), "", *table(["model", "precision", "time in operators"], operators), *below])


if __name__ == "__main__":
    with exit_on_input_error():
        main()
