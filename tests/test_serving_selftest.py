"""What an artefact answers to its known image is kept in it and asked again."""

from pathlib import Path

import numpy as np
import pytest
from artifacts import keep_answer, write_classifier, write_detector
from runtimes import ON_CPU

from backbones.errors import InputError
from serving.artifact import SelfTest, read_whole, write_artifact
from serving.runtime import OnnxModel
from serving.selftest import IMAGES, check, known_image, record


def test_known_images_are_the_same_everywhere():
    images = [known_image(number) for number in range(IMAGES)]
    assert {(image.dtype, image.shape) for image in images} == {(np.dtype(np.uint8), (240, 320, 3))}
    assert [int(image.sum(dtype=np.int64)) for image in images] == [28362971, 28634741, 28620572, 28139333]


@pytest.mark.parametrize("write", [write_classifier, write_detector])
@pytest.mark.parametrize("provider", ON_CPU)
def test_an_artefact_passes_what_it_kept(tmp_path, write, provider):
    path = keep_answer(write(tmp_path / "m.onnx"))
    check(OnnxModel(path, provider))


def test_one_without_an_answer_still_runs(tmp_path):
    model = OnnxModel(write_classifier(tmp_path / "m.onnx"), "cpu")
    assert model.metadata.self_test is None
    check(model)


def _with(path: Path, kept: SelfTest) -> OnnxModel:
    _, graph, artifact, _ = read_whole(path)
    write_artifact(graph, artifact.model_copy(update={"self_test": kept}), path)
    return OnnxModel(path, "cpu")


def test_a_classifier_that_answers_something_else_is_refused(tmp_path):
    path = write_classifier(tmp_path / "m.onnx")
    kept = record(OnnxModel(path, "cpu"))
    assert sorted(kept.values, reverse=True) == list(kept.values)
    spread = kept.values[0] - kept.values[-1]
    near, off = ([value + share * spread for value in kept.values] for share in (0.009, 0.02))
    check(_with(path, kept.model_copy(update={"values": tuple(near)})))
    with pytest.raises(InputError, match=r"fails its self-test on CPUExec.*logits differ by 0.02 of their spread"):
        check(_with(path, kept.model_copy(update={"values": tuple(off)})))


@pytest.mark.parametrize(
    "change",
    [
        {"values": (0.9, 0.65)},
        {"boxes": ((80, 60, 240, 180), (0, 0, 162, 240))},
        {"indices": (1, 1)},
        {"indices": (), "values": (), "boxes": ()},
    ],
)
def test_a_detector_that_answers_something_else_is_refused(tmp_path, change):
    path = write_detector(tmp_path / "m.onnx")
    kept = record(OnnxModel(path, "cpu"))
    assert kept == SelfTest(image=0, indices=(1, 0), values=(0.9, 0.6), boxes=((80, 60, 240, 180), (0, 0, 160, 240)))
    check(_with(path, kept))
    with pytest.raises(InputError, match="fails its self-test"):
        check(_with(path, kept.model_copy(update=change)))


def test_order_of_near_ties_is_no_matter(tmp_path):
    path = write_detector(tmp_path / "m.onnx")
    kept = record(OnnxModel(path, "cpu"))
    turned = {name: tuple(reversed(getattr(kept, name))) for name in ("indices", "values", "boxes")}
    check(_with(path, kept.model_copy(update=turned)))


def test_an_exported_artefact_keeps_its_answer(exported):
    model = OnnxModel(exported("classifier"), "cpu")
    assert model.metadata.self_test == record(model)
    check(model)
