"""What `OnnxModel` runs on and what it refuses."""

import importlib.util
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from artifacts import write_classifier, write_detector
from jobs import job
from onnx import helper, numpy_helper
from runtimes import NO_OPENVINO, ON_CPU, assert_equal, pixels

from backbones.errors import InputError
from serving.artifact import read_whole, write_artifact
from serving.batch import run_batch
from serving.config import ServedModel
from serving.runtime import OnnxModel, SideBySide
from serving.sessions import providers
from serving.sessions.ort import CudaGraphs
from serving.sessions.placement import NMS_ON_CPU, with_nms_on_cpu
from serving.sessions.providers import NAMES, PROVIDERS, Provider, driver_problem

Exported = Callable[..., Path]
Arrays = dict[str, np.ndarray[Any, Any]]
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("own_caches")
FAMILIES = ("retinanet", "fcos", "fasterrcnn_v2")


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "m.onnx")


def without_metadata(path: Path) -> None:
    graph = read_whole(path).graph
    del graph.metadata_props[:]
    onnx.save(graph, path)


def with_data_outside(path: Path) -> None:
    _, graph, artifact, _ = read_whole(path)
    tensor = graph.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    write_artifact(graph, artifact, path)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "no artefact at"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("A photograph.\n" * 9), "is no ONNX file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "lost its seal|beginning of one"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"Softmax", b"Sigmoid")), "was changed"),
        (without_metadata, "carries no cspnet metadata"),
        (with_data_outside, "keeps data in another file"),
    ],
)
def test_a_bad_file_reaches_no_runtime(
    classifier: Path, monkeypatch: pytest.MonkeyPatch, provider: Provider, spoil: Callable[[Path], Any], message: str
) -> None:
    def reached(*_: Any, **__: Any) -> Any:
        raise AssertionError("a session was opened")

    monkeypatch.setattr("serving.runtime.OrtSession", reached)
    monkeypatch.setattr("serving.runtime._openvino", reached)
    spoil(classifier)
    with pytest.raises(InputError, match=message):
        OnnxModel(classifier, provider)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpu_that_is_not_there_is_an_error_that_names_the_driver(classifier: Path, provider: Provider) -> None:
    if driver_problem() is None or NAMES[provider] not in ort.get_available_providers():
        pytest.skip("there is a GPU, or an onnxruntime without it")
    with pytest.raises(InputError, match=f"asked for {provider}, but .*{re.escape(providers._DRIVER)}.*or ask for cpu"):
        OnnxModel(classifier, provider)
    assert not classifier.with_name("m.onnx.cache").exists()


@pytest.mark.parametrize(("provider", "library"), [("cuda", r"\.so"), ("tensorrt", re.escape(providers._TENSORRT))])
def test_what_else_a_gpu_lacks_is_named(
    classifier: Path, monkeypatch: pytest.MonkeyPatch, provider: Provider, library: str
) -> None:
    """As on a machine whose driver was found, by what onnxruntime then really does."""
    if driver_problem() is None or sys.platform != "linux" or NAMES[provider] not in ort.get_available_providers():
        pytest.skip("there is a GPU, or an onnxruntime without it")
    monkeypatch.setattr(providers, "driver_problem", lambda: None)
    with pytest.raises(InputError, match=f"asked for {provider}, but .*{library}.*or ask for cpu"):
        OnnxModel(classifier, provider)


def test_an_onnxruntime_without_a_provider_says_which_to_install(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match="built without CUDAExecutionProvider: pip install onnxruntime-gpu"):
        OnnxModel(classifier, "cuda")


@pytest.mark.parametrize(("driver", "level"), [(True, logging.WARNING), (False, logging.INFO)])
def test_auto_takes_the_cpu_and_says_why(
    classifier: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, driver: bool, level: int
) -> None:
    """A GPU that is there and not used is worth a warning."""
    problem = driver_problem()
    if problem is None:
        pytest.skip("there is a GPU")
    monkeypatch.setattr("serving.runtime.driver_problem", lambda: None if driver else problem)
    with caplog.at_level(logging.INFO):
        assert OnnxModel(classifier).provider == "CPUExecutionProvider"
    said = [(record.levelno, record.message) for record in caplog.records]
    assert [line.split(",")[0] for _, line in said] == [
        "auto: asked for tensorrt",
        "auto: asked for cuda",
        "auto: CPUExecutionProvider",
    ]
    assert said[1][0] == level and said[2][0] == logging.INFO


def test_openvino_that_is_not_installed_is_an_error(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "openvino" else found(name, *a))
    with pytest.raises(InputError, match=re.escape("not installed: pip install 'cspnet[openvino]'; or ask for cpu")):
        OnnxModel(classifier, "openvino")
    (tmp_path / "i.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="asked for openvino"):  # before Ray starts
        models = [{"name": "m", "artifact": str(classifier), "provider": "openvino"}]
        run_batch(job(classifier, tmp_path / "i.jpg", tmp_path / "out", models=models))


def test_options_that_do_not_go_together(classifier: Path, tmp_path: Path) -> None:
    for provider in set(PROVIDERS) - {"cuda"}:
        with pytest.raises(InputError, match=f"cuda_graphs does not go with provider {provider}"):
            OnnxModel(classifier, provider, cuda_graphs=True)
    for provider in ("cuda", "tensorrt"):
        with pytest.raises(ValueError, match=f"provider {provider} needs num_gpus above 0"):
            ServedModel(name="m", artifact="m.onnx", provider=provider)
    for provider, num_gpus in (("tensorrt", 0), ("openvino", 1)):
        models = [{"name": "m", "artifact": "m.onnx", "provider": provider}]
        with pytest.raises(ValueError, match=f"provider {provider} does not go with num_gpus={num_gpus}"):
            job(classifier, "images", "out", models=models, actors={"num_gpus": num_gpus})


def test_the_command_line_offers_all_providers_without_a_runtime() -> None:
    code = "import sys; from serving.__main__ import main; sys.modules['onnxruntime'] = None; main(['eval', '--help'])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"{{{','.join(PROVIDERS)}}}" in "".join(said.split())


@pytest.mark.parametrize("provider", ON_CPU)
def test_wrong_inputs_are_refused_with_what_is_expected(tmp_path: Path, provider: Provider) -> None:
    model = OnnxModel(write_detector(tmp_path / "d.onnx"), provider, threads=1)
    images, sizes = pixels(2, 8, 8, 3), np.array([[8, 8], [8, 8]])
    assert model.run(images=images, sizes=sizes)["boxes"].shape == (2, 2, 4)
    wanted = r"takes images as uint8 \[any, any, any, 3\], not "
    for arrays, message in (
        ({}, "takes images, sizes, not nothing"),
        ({"images": images}, "takes images, sizes, not images$"),
        ({"images": images, "sizes": sizes, "size": sizes}, "not images, sizes, size$"),
        ({"images": images.astype(np.float32), "sizes": sizes}, wanted + r"float32 \[2, 8, 8, 3\]"),
        ({"images": images[0], "sizes": sizes}, wanted + r"uint8 \[8, 8, 3\]"),
        ({"images": images[..., :1], "sizes": sizes}, wanted + r"uint8 \[2, 8, 8, 1\]"),
        ({"images": images, "sizes": sizes.astype(np.int32)}, r"takes sizes as int64 \[any, 2\], not int32 \[2, 2\]"),
    ):
        with pytest.raises(InputError, match=message):
            model.run(**arrays)


def test_a_run_that_fails_is_told_in_a_line(classifier: Path) -> None:
    _, graph, artifact, _ = read_whole(classifier)
    graph.graph.initializer.append(numpy_helper.from_array(np.array([1, 3]), "one_image"))
    next(node for node in graph.graph.node if node.op_type == "Div").output[0] = "unshaped"
    graph.graph.node.insert(3, helper.make_node("Reshape", ["unshaped", "one_image"], ["scaled"]))
    write_artifact(graph, artifact, classifier)
    model = OnnxModel(classifier, "cpu", threads=1)
    one = model.run(images=pixels(1, 8, 8, 3))
    with pytest.raises(InputError, match=r"m.onnx fails on \w+ with images \(2, 8, 8, 3\): [^\n]+$"):
        model.run(images=pixels(2, 8, 8, 3))
    assert_equal(model.run(images=pixels(1, 8, 8, 3)), one)


@pytest.mark.parametrize(("said", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 3), ("", 3)])
def test_a_containers_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, cores: int
) -> None:
    (tmp_path / "cpu.max").write_text(said)
    monkeypatch.setattr(providers, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(providers.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert providers.usable_cores() == cores
    (tmp_path / "cpu.max").unlink()
    assert providers.usable_cores() == 3


@pytest.mark.parametrize("provider", ON_CPU)
def test_threads_run_at_once(tmp_path: Path, provider: Provider) -> None:
    model = OnnxModel(write_classifier(tmp_path / "m.onnx", work=2), provider, threads=1)
    batches = [pixels(1 + seed % 3, 8 + seed, 8, 3, seed=seed) for seed in range(24)]
    wanted = [model.run(images=batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(lambda batch: model.run(images=batch), batches), wanted, strict=True):
            assert_equal(found, alone)


class Held:
    """A session that notes its runs by name, and ends each when it is let."""

    provider = "CPUExecutionProvider"

    def __init__(self, name: str, ran: list[str], like: OnnxModel):
        self.name, self.ran = name, ran
        self.inputs, self.outputs = like.inputs, like.outputs
        self.entered, self.let = threading.Semaphore(0), threading.Semaphore(0)

    def run(self, inputs: Mapping[str, Any]) -> list[Any]:
        self.ran.append(self.name)
        self.entered.release()
        assert self.let.acquire(timeout=10)
        return [np.zeros(1)] * len(self.outputs)

    def wait_entered(self) -> None:
        assert self.entered.acquire(timeout=10)


def test_a_lone_run_goes_wide_and_one_beside_another_narrow(classifier: Path) -> None:
    ran: list[str] = []
    models = [OnnxModel(classifier, "cpu", threads=1, cache=False) for _ in range(2)]
    wide, narrow = (Held(name, ran, model) for name, model in zip(("wide", "narrow"), models, strict=True))
    models[0]._session, models[1]._session = wide, narrow
    model, images = SideBySide(*models), pixels(1, 8, 8, 3)
    assert (model.sha256, model.metadata, model.provider) == (models[0].sha256, models[0].metadata, models[0].provider)
    with ThreadPoolExecutor(3) as pool:
        alone = pool.submit(model.run, images=images)
        wide.wait_entered()
        beside = [pool.submit(model.run, images=images) for _ in range(2)]
        for _ in beside:
            narrow.wait_entered()
        assert ran == ["wide", "narrow", "narrow"]
        wide.let.release()
        alone.result()
        beside.append(pool.submit(model.run, images=images))  # two others run still
        narrow.wait_entered()
        narrow.let.release(3)
        for future in beside:
            future.result()
        with pytest.raises(InputError, match="takes images, not nothing"):
            model.run()  # no longer under way, though it failed
        again = pool.submit(model.run, images=images)
        wide.wait_entered()
        wide.let.release()
        again.result()
    assert ran == ["wide", *["narrow"] * 3, "wide"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ("classifier", *FAMILIES))
def test_runs_side_by_side_have_a_lone_ones_bits(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    wide, narrow = (OnnxModel(exported(family), "cpu", threads) for threads in (2, 1))
    batches: list[Arrays] = []
    for seed, (n, h, w) in enumerate(6 * [(1, 128, 128), (3, 128, 256), (1, 256, 128), (2, 128, 128)]):
        batches.append({"images": pixels(n, h, w, 3, seed=seed)})
        if family != "classifier":
            batches[-1]["sizes"] = np.array([[h - 7 * i, w - 11 * i] for i in range(n)])
    wanted = [wide.run(**batch) for batch in batches]
    for batch, alone in zip(batches, wanted, strict=True):
        assert_equal(narrow.run(**batch), alone)

    beside: list[int] = []
    own = narrow.run

    def counted(**inputs: Any) -> dict[str, Any]:
        beside.append(len(inputs["images"]))
        return own(**inputs)

    monkeypatch.setattr(narrow, "run", counted)
    model, together = SideBySide(wide, narrow), threading.Barrier(4)

    def run(batch: Arrays) -> Mapping[str, Any]:
        together.wait(60)
        return model.run(**batch)

    with ThreadPoolExecutor(together.parties) as pool:
        for found, alone in zip(pool.map(run, batches), wanted, strict=True):
            assert_equal(found, alone)
    assert 0 < len(beside) <= len(batches) * 3 // 4  # of each four that start at once, the first is alone


def test_buffers_of_cuda_graphs(classifier: Path) -> None:
    """On the CPU, which binds as a GPU does, and runs where that would replay."""
    session = OnnxModel(classifier, "cpu", cache=False)._session._session  # type: ignore[attr-defined]
    graphs = CudaGraphs(device="cpu")
    batches = [pixels(1 + seed % 2, 8, 8, 3, seed=seed) for seed in range(12)]
    found = [graphs.run(session, {"images": batch}) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda batch: graphs.run(session, {"images": batch}), batches))
    assert len(graphs._bound) == 2  # shapes
    for batch, *both in zip(batches, found, again, strict=True):  # no run has written over another's outputs
        for outputs in both:
            for output, wanted in zip(outputs, session.run(None, {"images": batch}), strict=True):
                np.testing.assert_array_equal(output, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "nms", "moved"),
    [
        ("retinanet", 1, ["Equal", "Where", "NonMaxSuppression"]),
        ("fcos", 1, ["Equal", "Where", "NonMaxSuppression"]),
        ("fasterrcnn_v2", 2, ["NonMaxSuppression"]),  # the first is that of the proposals
    ],
)
def test_the_nms_that_a_gpu_leaves_to_the_cpu(exported: Exported, family: str, nms: int, moved: list[str]) -> None:
    content = exported(family).read_bytes()
    nodes = onnx.load_from_string(with_nms_on_cpu(content)).graph.node
    marked = [node for node in nodes if any(entry.key == "layer_ann" for entry in node.metadata_props)]
    assert [node.op_type for node in marked] == moved
    found = [node.name for node in nodes if node.op_type == "NonMaxSuppression"]
    assert len(found) == nms and found[-1] == marked[-1].name
    for node in marked:
        del node.metadata_props[:]
    assert list(nodes) == list(onnx.load_from_string(content).graph.node)  # nothing else is changed


@pytest.mark.parametrize(
    ("write", "provider", "marked"),
    [(write_detector, "cuda", True), (write_detector, "tensorrt", False), (write_classifier, "cuda", False)],
)
def test_what_onnxruntime_is_told_of_a_gpu(write, provider, marked, tmp_path, monkeypatch) -> None:
    """Its session is in place of one that needs the GPU."""
    opened: list[tuple[bytes, Any, Any]] = []

    class Session:
        def __init__(self, content: bytes, options: Any, providers: Any, **_: object):
            opened.append((content, options, providers))

        def get_providers(self) -> list[str]:
            return [NAMES[provider]]

        def get_inputs(self) -> list[Any]:
            return []

        get_outputs = get_inputs

    monkeypatch.setattr("serving.sessions.ort.missing", lambda _: None)
    monkeypatch.setattr("serving.sessions.ort.with_nms_on_cpu", lambda content: content[::-1])
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(ort, "set_default_logger_severity", lambda _: None)
    path = write(tmp_path / "m.onnx")
    OnnxModel(path, provider, cache=False)
    [(content, options, chosen)] = opened
    assert content == path.read_bytes()[:: -1 if marked else 1]
    entry, value = NMS_ON_CPU
    if marked:
        assert options.get_session_config_entry(entry) == value
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(entry)
    assert chosen[0][0] == NAMES[provider] and "prefer_nhwc" not in chosen[0][1]


@pytest.mark.slow
@pytest.mark.skipif(NO_OPENVINO, reason="no openvino")
@pytest.mark.parametrize("family", ("classifier", *FAMILIES))
def test_openvino_equals_onnxruntime(exported: Exported, family: str) -> None:
    """One compiled model for all shapes, from a cold start and from the cache; after onnxruntime has run in the thread,
    which leaves it in a mode that OpenVINO's integers once suffered from.
    """
    reference = OnnxModel(exported(family), "cpu", threads=2, cache=False)
    found_objects = 0
    for start in range(2):
        model = OnnxModel(exported(family), "openvino", threads=2)
        assert (list(model.inputs), list(model.outputs)) == (list(reference.inputs), list(reference.outputs))
        for n, h, w in ((1, 128, 128), (3, 128, 256), (1, 128, 128), (2, 256, 128)):
            arrays: Arrays = {"images": pixels(n, h, w, 3, seed=n)}
            if family != "classifier":
                arrays["sizes"] = np.array([[h - 7 * i, w - 11 * i] for i in range(n)])
            wanted, found = reference.run(**arrays), model.run(**arrays)
            found_objects += int(wanted["num_detections"].sum()) if family != "classifier" else n
            for output, value in wanted.items():
                assert (found[output].dtype, found[output].shape) == (value.dtype, value.shape)
                np.testing.assert_allclose(
                    found[output], value, rtol=1e-5, atol={"boxes": 1e-2}.get(output, 1e-4), err_msg=f"{start} {output}"
                )
            alone = [model.run(**{key: value[i : i + 1] for key, value in arrays.items()}) for i in range(n)]
            rounding = 1e-4 if family == "fasterrcnn_v2" else 0  # its box head multiplies a batch's boxes as one matrix
            for output, value in found.items():
                each = np.concatenate([one[output] for one in alone])
                np.testing.assert_allclose(each, value, rtol=0, atol=rounding, err_msg=output)
    assert found_objects > 10
