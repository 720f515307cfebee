"""Every network through `serving export`, with random weights: that it comes out, how long it takes, what it says.

    python -m benchmarks.sweep [NAME …] [--canvas 128 256] [--again] [--json FILE]

Names are of classifiers, their `_plain` twins and detectors; without any, all classifiers of the table and, of the
detectors, every family, version and neck over a small backbone, and one of each over the other kinds. Detectors see
small pictures, `--canvas`, since neither the graph nor the time to trace it knows their size; the time to compare does,
and `--canvas 800 1333` is what an export takes. It compares with PyTorch. Here each artefact runs again, with noise in
its padding: an image alone, on all cores or on one, and in a batch must get the same bits. `--again` exports a second
time and compares the files. Exit status 1 if a network fails.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones.cli import at_least
from backbones.errors import InputError, exit_on_input_error
from backbones.files import versions, write_json
from backbones.variants import VARIANTS
from benchmarks.contest import table
from benchmarks.export import random_classifier, random_detector
from detection.names import is_detector
from detection.published import RESNET50
from detection.spec import names
from serving.artifact import ClassifierArtifact
from serving.export import run_export
from serving.runtime import OnnxModel, usable_cores

PLAIN = ("cspresnet50", "cspdarknet53_paper", "cs3se_edgenet_x", "cspdensenet201_elastic", "csppeleenet")
OTHERS = (
    f"fasterrcnn_{RESNET50}_fpn", f"retinanet_{RESNET50}_efm_v2", "fcos_cspdensenet201_elastic_efm",
    "maskrcnn_csppeleenet_fpn_v2", "retinanet_cs3se_edgenet_x_efm", "fasterrcnn_cs3sedarknet_xdw_efm_v2",
    "maskrcnn_cspdarknet53_paper_fpn", "fcos_cspresnext50_paper_fpn", "retinanet_darknetaa53_fpn",
    "fasterrcnn_cs3darknet_focus_m_fpn", "fcos_cspresnet50_plain_fpn", "fasterrcnn_cspdarknet50_plain_efm",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--canvas", nargs=2, type=at_least(1), default=(128, 256), metavar=("SHORT", "LONG"))
    parser.add_argument("--again", action="store_true", help="export each twice; the files must be the same")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(usable_cores())
    chosen = args.names or [*VARIANTS, *(f"{name}_plain" for name in PLAIN), *names(["cspresnet10"]), *OTHERS]
    rows = []
    for name in chosen:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = export(name, Path(folder), tuple(args.canvas), args.again)
            except Exception as error:  # what torch.export raises has no base of its own
                kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
                row = {"problem": kind + str(error).partition("\n")[0]}
        rows.append({"model": name} | row)
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "settings": vars(args) | {"json": None}, "versions": versions("torch", "onnx", "onnxruntime-gpu"), "rows": rows,
    }  # fmt: skip
    print(markdown(result))
    if args.json:
        write_json(args.json, result)
    sys.exit(any("problem" in row for row in rows))


def export(name: str, folder: Path, canvas: tuple[int, int], again: bool) -> dict[str, Any]:
    """What came of one network.

    Raises:
        InputError: it cannot be exported, or its artefact does not keep what is promised.
    """
    weights, artifact = folder / "w.safetensors", folder / "m.onnx"
    if is_detector(name):
        random_detector(name, weights, canvas)
    else:
        random_classifier(name, weights)
    start, cpu = time.perf_counter(), time.process_time()
    parity = run_export(str(weights), artifact).parity
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    if again:
        run_export(str(weights), folder / "again.onnx")
        if (folder / "again.onnx").read_bytes() != artifact.read_bytes():
            raise InputError(f"{name}: the second export gave other bytes")
    check_bits(name, OnnxModel(artifact, "cpu", cache=False), OnnxModel(artifact, "cpu", 1, cache=False))
    return took | {
        "megabytes": artifact.stat().st_size / 1e6,
        **parity.model_dump(include={"detections", "unmatched", "largest"}),
    }


def check_bits(name: str, wide: OnnxModel, narrow: OnnxModel, size: int = 3) -> None:
    """That images of noise get the same bits in a batch and alone, where their padding is other noise.

    Args:
        wide: runs on all cores, the batch and the images.
        narrow: of the same artefact, runs the images on one.

    Raises:
        InputError: an output that does not.
    """
    rng, said = np.random.default_rng(0), wide.metadata
    height, width = (said.preprocess.crop,) * 2 if isinstance(said, ClassifierArtifact) else said.canvases[-1]
    blocks = rng.integers(0, 256, (size, height // 16, width // 16, 3), dtype=np.uint8)
    images = blocks.repeat(16, 1).repeat(16, 2)
    sizes = np.stack([rng.integers(side // 2, side + 1, size) for side in (height, width)], 1)

    def run(model: OnnxModel, rows: slice) -> dict[str, Any]:
        if isinstance(said, ClassifierArtifact):
            return model.run(images=images[rows])
        padded = rng.integers(0, 256, images[rows].shape, dtype=np.uint8)
        for canvas, image, (h, w) in zip(padded, images[rows], sizes[rows], strict=True):
            canvas[:h, :w] = image[:h, :w]
        return model.run(images=padded, sizes=sizes[rows])

    together = run(wide, slice(size))
    for i in range(size):
        for where, model in (("alone", wide), ("on one core", narrow)):
            for output, value in run(model, slice(i, i + 1)).items():
                if not np.array_equal(value[0], together[output][i]):
                    raise InputError(f"{name}: {output} of image {i} are others {where} than in a batch of {size}")


def markdown(result: dict[str, Any]) -> str:
    """A line a network."""

    def cells(row: dict[str, Any]) -> list[str]:
        if "problem" in row:
            return [row["model"], "", "", "", "", row["problem"]]
        off = ", ".join(f"{output} {value:.1e}" for output, value in row["largest"].items())
        found = f"{row['unmatched']} of {row['detections']}" if row["detections"] else ""
        took = (f"{row[key]:.0f}" for key in ("seconds", "cpu_seconds"))
        return [row["model"], *took, f"{row['megabytes']:.1f}", found, off]

    return "\n".join(
        table(["model", "s", "CPU s", "MB", "unmatched", "largest difference"], map(cells, result["rows"]))
    )


if __name__ == "__main__":
    with exit_on_input_error():
        main()
