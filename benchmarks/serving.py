"""The service against a bare onnxruntime loop and against other servers.

    python -m benchmarks.serving [--parts bare peers] [--rounds 3] [--seconds 4] [--peers LitServe …]
        [--peer-models cspresnet50 nothing] [--provider cpu] [--replicas 1] [--json FILE]

bare: a classifier (cspresnet50 at 256², a photograph-sized JPEG) and a detector at saturation and with one client,
against the best of four loops that decode and run the same JPEG in one process without HTTP, both on `--provider`:
while nothing else runs and, "beside", while the service is there and idle, whose processes take from the loop, too.

peers: this project's server at its defaults, Ray Serve at its, LitServe, BentoML, and FastAPI on uvicorn
(`benchmarks/peers/`), each on the same artefact: cspresnet50 with the JPEG of before, three times as long a turn, and a
model that costs nothing with a small picture, so that what is measured is the server.

Every round starts and ends each server and lets each have its turn, so that no server idles beside another; figures
are medians over the rounds, and ratios those of a round. Server and load (wrk, or without it processes of ours) share
the machine's cores. Random weights. The peers' environments are kept in the user's cache: the first run takes some
minutes more.
"""

import argparse
import io
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from backbones.cli import at_least
from backbones.errors import exit_on_input_error
from backbones.files import versions, write_json
from backbones.preprocess import ClassifierPreprocess
from benchmarks import bare, servers
from benchmarks.contest import table, with_spread
from benchmarks.export import random_classifier, random_detector
from benchmarks.load import load
from serving.artifact import ClassifierArtifact, Parity, write_artifact
from serving.export import run_export
from serving.sessions.providers import ON_GPU, PROVIDERS

CLASSIFIER, DETECTOR, NOTHING = "cspresnet50", "fcos_cspresnet10_fpn", "nothing"
SATURATING = 32  # clients
CLIENTS = ("1", "8", "32", "128")
PHOTO = 640, 480  # pixels
PICTURES = {CLASSIFIER: PHOTO, NOTHING: (64, 48)}  # that peers are asked about
OURS = "cspnet"
Figures = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("bare", "peers"), default=("bare", "peers"))
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--seconds", type=at_least(1), default=4, help="of each measurement")
    parser.add_argument("--peers", nargs="*", choices=servers.PEERS, default=list(servers.PEERS))
    parser.add_argument("--peer-models", nargs="+", choices=tuple(PICTURES), default=tuple(PICTURES))
    parser.add_argument("--models", nargs="+", choices=(CLASSIFIER, DETECTOR), default=(CLASSIFIER, DETECTOR))
    parser.add_argument("--provider", choices=PROVIDERS, default="cpu", help="of the part bare")
    parser.add_argument("--replicas", type=at_least(1), default=1, help="of each model of the part bare")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    result: Figures = {"settings": vars(args) | {"json": None}, "versions": versions("ray", "onnxruntime-gpu")}
    with tempfile.TemporaryDirectory() as folder:
        if "bare" in args.parts:
            result["bare"] = against_bare(args, Path(folder))
        if "peers" in args.parts:
            result["peers"] = {name: against_peers(args, name, Path(folder)) for name in args.peer_models}
            result["versions"] |= {name: servers.version(name) for name in args.peers}
    print(markdown(result))
    if args.json:
        write_json(args.json, result)


def against_bare(args: argparse.Namespace, folder: Path) -> Figures:
    """By model: images/s and ms of the service and of the loops in each round."""
    picture = jpeg(folder / "photo.jpg", *PHOTO)
    body = picture.read_bytes()
    models = {name: artifact(name, folder) for name in args.models}
    settings: Figures = {"provider": args.provider, "replicas": args.replicas}
    if args.provider in ON_GPU:
        settings["num_gpus"] = 1 / (len(models) * args.replicas)  # they share it
    rounds: Figures = {name: [] for name in models}
    for _ in range(args.rounds):
        loops = {
            name: {kind: loop(args.seconds) for kind, loop in bare.loops(path, [body], args.provider).items()}
            for name, path in models.items()
        }
        latency = {name: bare.latency_ms(path, body, args.seconds, args.provider) for name, path in models.items()}
        with servers.ours(models, folder, picture, **settings) as running:
            for name, server in running.items():
                figures: Figures = {"loops": loops[name], "bare_ms": latency[name]}
                best = max(loops[name], key=loops[name].__getitem__)
                figures["beside"] = bare.loops(models[name], [body], args.provider)[best](args.seconds)
                figures["beside_ms"] = bare.latency_ms(models[name], body, args.seconds, args.provider)
                figures["saturated"] = load(server.post, SATURATING, 2 * args.seconds)
                figures["one"] = load(server.post, 1, args.seconds)
                figures["share"] = figures["saturated"]["requests_per_s"] / max(loops[name].values())
                figures["share_beside"] = figures["saturated"]["requests_per_s"] / figures["beside"]
                figures["extra_ms"] = figures["one"]["p50_ms"] - latency[name]
                figures["extra_beside_ms"] = figures["one"]["p50_ms"] - figures["beside_ms"]
                rounds[name].append(figures)
                print(json.dumps({name: figures}), flush=True)
    return rounds


def against_peers(args: argparse.Namespace, model: str, folder: Path) -> Figures:
    """By server, a list of rounds; by number of clients: requests/s and the like."""
    picture, path = jpeg(folder / f"{model}.jpg", *PICTURES[model]), artifact(model, folder)
    seconds = args.seconds if model == NOTHING else 3 * args.seconds  # few requests a second
    rounds: Figures = {name: [] for name in (OURS, *args.peers)}
    for turn in range(args.rounds):
        names = list(rounds)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # who comes first changes
            figures: Figures = {"clients": {}}
            if name == OURS:
                with servers.ours({model: path}, folder, picture) as running:
                    measure(running[model], seconds, figures)
            else:
                with servers.peer(name, path, folder, picture) as server:
                    measure(server, seconds, figures)
            rounds[name].append(figures)
            print(json.dumps({model: {name: figures}}), flush=True)
    return rounds


def measure(server: servers.Running, seconds: float, figures: Figures) -> None:
    """One server at each number of clients."""
    figures["cold_start_s"] = server.cold_start_s
    for clients in CLIENTS:
        figures["clients"][clients] = load(server.post, int(clients), seconds)
    figures["memory_mb"] = server.memory_mb()


def artifact(name: str, folder: Path) -> Path:
    """Exported with random weights, unless it is there."""
    path, weights = folder / f"{name}.onnx", folder / f"{name}.safetensors"
    if path.exists():
        return path
    if name == NOTHING:
        return write_nothing(path)
    torch.manual_seed(0)
    (random_classifier if name == CLASSIFIER else random_detector)(name, weights)
    run_export(str(weights), path)
    return path


def write_nothing(path: Path, crop: int = 32) -> Path:
    """A classifier of three classes that costs nothing: the softmax of the mean of R, G and B."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),  # [N, H, W, 3]
        helper.make_node("ReduceMean", ["pixels", "hw"], ["logits"], keepdims=0),  # [N, 3]
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    constants = [numpy_helper.from_array(np.array([1, 2]), "hw")]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])
    outputs = [helper.make_tensor_value_info(key, TensorProto.FLOAT, ["N", 3]) for key in ("logits", "probabilities")]
    graph = helper.make_graph(nodes, NOTHING, [images], outputs, constants)
    metadata = ClassifierArtifact(
        model=NOTHING, classes=("red", "green", "blue"), preprocess=ClassifierPreprocess(resize=crop, crop=crop),
        opset=18, gmacs=0.0, weights_sha256="0" * 64, config={}, versions={},
        parity=Parity(batch_sizes=(1,), images=1, largest={}),
    )  # fmt: skip
    write_artifact(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), metadata, path)
    onnx.checker.check_model(str(path))
    return path


def jpeg(path: Path, width: int, height: int) -> Path:
    """Smooth noise, which compresses about as a photograph does."""
    small = np.random.default_rng(0).integers(0, 255, (max(2, height // 8), max(2, width // 8), 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    path.write_bytes(buffer.getvalue())
    return path


def markdown(result: Figures) -> str:
    """A table of each part that was measured."""
    tables = [bare_table(result["bare"])] if "bare" in result else []
    tables += [[f"{name}:", "", *peers_table(rounds)] for name, rounds in result.get("peers", {}).items()]
    return "\n\n".join("\n".join(lines) for lines in tables)


def bare_table(rounds: Figures) -> list[str]:
    head = ["model", "images/s", "best loop", "share of it", "share beside", "p50 of one client, ms", "bare, ms"]
    rows = []
    for name, turns in rounds.items():
        kinds = turns[0]["loops"]
        best = max(kinds, key=lambda kind: statistics.median(turn["loops"][kind] for turn in turns))
        rows.append(
            [
                name,
                _median(turn["saturated"]["requests_per_s"] for turn in turns),
                f"{_median(turn['loops'][best] for turn in turns)}, {best}",
                _spread([turn["share"] for turn in turns]),
                _spread([turn["share_beside"] for turn in turns]),
                _median(turn["one"]["p50_ms"] for turn in turns),
                _median(turn["bare_ms"] for turn in turns),
                _spread([turn["extra_ms"] for turn in turns]),
                _spread([turn["extra_beside_ms"] for turn in turns]),
            ]
        )
    return table([*head, "more, ms", "more, beside, ms"], rows)


def _spread(values: Sequence[float]) -> str:
    return with_spread(statistics.median(values), min(values), max(values))


def peers_table(rounds: Figures) -> list[str]:
    """Requests/s with p50 and p99 at each number of clients; and how many times each server's is ours."""
    measured = list(rounds[OURS][0]["clients"])
    head = ["server", *(f"{clients} clients: req/s, p50 / p99 ms" for clients in measured)]
    head += ["ours over it", "errors", "cold start, s", "memory, MB"]
    rows = []
    for name, turns in rounds.items():
        cells, ratios = [], []
        for clients in measured:
            each = [turn["clients"][clients] for turn in turns]
            p50, p99 = (_median(figures[key] for figures in each) for key in ("p50_ms", "p99_ms"))
            cells.append(f"{_median(figures['requests_per_s'] for figures in each)}, {p50} / {p99}")
            speeds = [
                (us["clients"][clients], it["clients"][clients]) for us, it in zip(rounds[OURS], turns, strict=True)
            ]
            ratios.append(f"{statistics.median(us['requests_per_s'] / it['requests_per_s'] for us, it in speeds):.2f}")
        errors = sum(int(figures["errors"]) for turn in turns for figures in turn["clients"].values())
        rest = [
            str(errors),
            _median(turn["cold_start_s"] for turn in turns),
            _median(turn["memory_mb"] for turn in turns),
        ]
        rows.append([name, *cells, " / ".join(ratios), *rest])
    return table(head, rows)


def _median(values: Any) -> str:
    return f"{statistics.median(values):.4g}"


if __name__ == "__main__":
    with exit_on_input_error():
        main()
