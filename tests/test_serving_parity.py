"""Artefacts of every family equal PyTorch, an image's batch changes no bit, and what differs is refused.

Shapes: N images, H x W canvas.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from artifacts import write_classifier, write_detector
from exported import FAMILIES
from PIL import Image

from backbones.cspnet import create_model
from backbones.engine import normalize
from backbones.errors import InputError
from detection.weights import load_detector
from serving.parity import (
    BATCH_SIZES,
    Match,
    _batches,
    compare_classifier,
    compare_detector,
    measure_detector,
    pictures,
)
from serving.runtime import OnnxModel

CANVASES = [(128, 128), (128, 256), (256, 128)]
Exported = Callable[[str], Path]
Array = npt.NDArray[np.generic]


def random_images(rng: np.random.Generator, n: int, canvas: tuple[int, int]) -> tuple[Array, Array]:
    """Blocks of colour in the corner of a canvas whose rest is noise: padding must not matter."""
    images = rng.integers(0, 256, (n, *canvas, 3), dtype=np.uint8)
    sizes = np.stack([rng.integers(side // 2, side + 1, n) for side in canvas], 1)
    for image, (h, w) in zip(images, sizes, strict=True):
        blocks = rng.integers(0, 256, (h // 16 + 1, w // 16 + 1, 3), dtype=np.uint8)
        image[:h, :w] = blocks.repeat(16, 0).repeat(16, 1)[:h, :w]
    return images, sizes


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_changes_no_bit(exported: Exported, family: str) -> None:
    """Alone, in random mixes of random order and number, with another padding, and on one thread or two."""
    rng = np.random.default_rng(0)
    for threads in (1, 2):
        model = OnnxModel(exported(family), provider="cpu", threads=threads)
        for canvas in CANVASES:
            images, sizes = random_images(rng, 4, canvas)
            images[3], sizes[3] = 0, (1, 1)  # hardly anything is found there
            alone = [model.run(images=images[i : i + 1], sizes=sizes[i : i + 1]) for i in range(4)]
            assert sum(int(found["num_detections"][0]) for found in alone) > 20
            for _ in range(3):
                mix = rng.integers(0, 4, rng.integers(2, 9))
                batch = images[mix]
                for image, (h, w) in zip(batch, sizes[mix], strict=True):
                    image[h:] = image[:, w:] = rng.integers(256)
                for name, found in model.run(images=batch, sizes=sizes[mix]).items():
                    for row, i in zip(found, mix, strict=True):
                        np.testing.assert_array_equal(row, alone[i][name][0], f"{name} of image {i} in {mix}")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_operators_are_onnxs_own(exported: Exported, family: str) -> None:
    graph = onnx.load(exported(family))
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 18)]
    assert not graph.functions
    assert {node.domain for node in graph.graph.node} == {""}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_detectors_equal_torchvision(exported: Exported, family: str) -> None:
    """Export has compared already; here with more pictures, and with the figures."""
    model, _ = load_detector(exported(family).parent / "w.safetensors")
    onnx_model = OnnxModel(exported(family), provider="cpu")
    rng = np.random.default_rng(1)
    sides = [(96, 128), (128, 96), (60, 128), (128, 50)]
    images = [Image.fromarray(random_images(rng, 1, side)[0][0]) for side in sides for _ in range(2)]
    parity = compare_detector(model.eval(), onnx_model, iter(images))
    assert (parity.batch_sizes, parity.images) == (BATCH_SIZES, 8)
    assert parity.detections > 8 * len(BATCH_SIZES)
    assert parity.unmatched <= 0.01 * parity.detections
    assert set(parity.largest) == {"scores", "boxes"} | ({"masks"} if "maskrcnn" in family else set())
    assert all(0 <= value < 1e-2 for value in parity.largest.values())
    assert any(parity.largest.values())  # something was compared


@pytest.mark.slow
def test_a_detector_that_differs_is_refused(exported: Exported) -> None:
    model, _ = load_detector(exported("fcos").parent / "w.safetensors")
    onnx_model = OnnxModel(exported("fcos"), provider="cpu")
    images = pictures(None, 128, 96)
    with torch.no_grad():
        model.head.regression_head.bbox_reg.bias += 0.01
    with pytest.raises(InputError, match="boxes differ by|on one side alone"):
        compare_detector(model.eval(), onnx_model, images, (1,))
    with torch.no_grad():
        model.head.regression_head.bbox_reg.bias += 10
    parity = measure_detector(model, onnx_model, images, (1,))
    assert 0 < parity.unmatched <= parity.detections


@pytest.mark.slow
def test_classifiers(exported: Exported) -> None:
    onnx_model = OnnxModel(exported("classifier"), provider="cpu")
    model = create_model("cspresnet10", 3, exported("classifier").parent / "w.safetensors").eval()
    images = pictures(None, 40, 40) * 3
    parity = compare_classifier(model, onnx_model, iter(images), (1, 5))
    assert (parity.images, parity.batch_sizes, parity.agreement) == (12, (1, 5), 1.0)
    assert all(0 < value < 1e-4 for value in parity.largest.values())
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "fc.bias" in name)[0] += 0.01
    with pytest.raises(InputError, match="the graph and PyTorch disagree: logits differ by"):
        compare_classifier(model, onnx_model, images)


def test_every_image_is_in_batches_of_every_size() -> None:
    for count in (1, 2, 3, 7, 8):
        for size in BATCH_SIZES:
            batches = list(_batches(count, (size,)))
            assert all(len(batch) == size for batch in batches)
            assert [i for batch in batches for i in batch][:count] == list(range(count))


class Nonsense:
    """An artefact's stand-in whose answers are made by hand."""

    def __init__(self, path: Path, answer: Callable[..., dict[str, Array]]) -> None:
        self.metadata, self.run = OnnxModel(path, "cpu", cache=False).metadata, answer


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    model = create_model("cspresnet10", 3).eval()
    path = write_classifier(tmp_path / "m.onnx")

    def answer(images: Array) -> dict[str, Array]:
        return dict.fromkeys(("logits", "probabilities"), np.full((len(images), 3), np.nan, np.float32))

    with pytest.raises(InputError, match="logits differ by nan"):
        compare_classifier(model, Nonsense(path, answer), pictures(None, 40, 40))  # type: ignore[arg-type]


def test_every_row_of_a_batch_is_compared(tmp_path: Path) -> None:
    """Of four pictures in a batch of eight, the last rows see them again."""
    model = create_model("cspresnet10", 3).eval()
    path = write_classifier(tmp_path / "m.onnx")

    @torch.inference_mode()
    def answer(images: Array) -> dict[str, Array]:
        preprocess = OnnxModel(path, "cpu", cache=False).metadata.preprocess
        logits = model(normalize(torch.from_numpy(images), preprocess))
        logits[4:] = -7
        return {"logits": logits.numpy(), "probabilities": logits.softmax(1).numpy()}

    images = pictures(None, 40, 40)
    assert compare_classifier(model, Nonsense(path, answer), images, (1, 3)).agreement == 1  # type: ignore[arg-type]
    with pytest.raises(InputError, match="logits differ by"):
        compare_classifier(model, Nonsense(path, answer), images)  # type: ignore[arg-type]


def test_a_detection_has_one_partner(tmp_path: Path) -> None:
    match = Match(OnnxModel(write_detector(tmp_path / "m.onnx"), "cpu", cache=False).metadata)
    one = {"boxes": np.float32([[1, 2, 30, 40]]), "scores": np.float32([0.9]), "labels": np.array([1])}
    copies = {name: value.repeat(3, 0) for name, value in one.items()}
    match.add(one, copies)
    match.add(copies, one)
    assert (match.detections, match.unmatched) == (4, 2)


def test_drawn_pictures_are_of_several_shapes() -> None:
    sizes = {image.size for image in pictures(None, 1333, 800)}
    assert any(w > h for w, h in sizes) and any(w < h for w, h in sizes)


def test_too_few_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(InputError, match="has 1 images: give a folder with at least 4"):
        pictures(tmp_path, 8, 8)
