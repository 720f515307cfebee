"""What is kept of an artefact's start, by what `OnnxModel` then does."""

import importlib.util
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest
from artifacts import write_classifier, write_detector
from runtimes import NO_OPENVINO, ON_CPU, assert_equal, pixels

from backbones.errors import InputError
from serving.artifact import read_whole, write_artifact
from serving.runtime import OnnxModel
from serving.sessions import graph_cache
from serving.sessions.providers import Provider

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "m.onnx")


def entries(artefact: Path) -> list[Path]:
    return sorted(artefact.with_name(f"{artefact.name}.cache").iterdir())


@pytest.mark.parametrize("provider", ON_CPU)
def test_a_second_start_reads_the_first_ones_entry(tmp_path: Path, provider: Provider) -> None:
    classifier, detector = write_classifier(tmp_path / "c.onnx"), write_detector(tmp_path / "d.onnx")
    model = OnnxModel(classifier, provider)
    (entry,) = entries(classifier)
    batch = pixels(3, 8, 8, 3)
    for second in (OnnxModel(classifier, provider), OnnxModel(classifier, provider, threads=1)):
        assert (second.inputs, second.outputs) == (model.inputs, model.outputs)
        assert_equal(second.run(images=batch), model.run(images=batch))
    assert entries(classifier) == [entry]

    swapped = OnnxModel(detector, provider).outputs  # an entry that is not the artefact's shows that it was read
    content = entries(detector)[0].read_bytes()
    entry.unlink()
    (entry.parent / f"{entry.name.rsplit('.', 1)[0]}.{zlib.crc32(content):08x}").write_bytes(content)
    assert OnnxModel(classifier, provider).outputs == swapped
    assert OnnxModel(classifier, provider, cache=False).outputs == model.outputs


@pytest.mark.parametrize("provider", ON_CPU)
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2] + b"\x55\xaa" + content[len(content) // 2 + 2 :],
        lambda content: content[:-1],
        lambda content: b"",
    ],
)
def test_a_damaged_entry_is_counted_and_made_again(
    classifier: Path, caplog: pytest.LogCaptureFixture, provider: Provider, damage: Callable[[bytes], bytes]
) -> None:
    model = OnnxModel(classifier, provider)
    (entry,) = entries(classifier)
    entry.write_bytes(damage(entry.read_bytes()))
    again = OnnxModel(classifier, provider)
    assert "1 damaged in" in caplog.text
    assert_equal(again.run(images=pixels(2, 8, 8, 3)), model.run(images=pixels(2, 8, 8, 3)))
    caplog.clear()
    (entry,) = entries(classifier)
    OnnxModel(classifier, provider)
    assert entries(classifier) == [entry] and not caplog.text


@pytest.mark.parametrize("provider", ON_CPU)
@pytest.mark.parametrize("content", [b"", b"not a graph" * 99])
def test_a_whole_entry_that_is_no_graph_is_made_again(
    classifier: Path, caplog: pytest.LogCaptureFixture, provider: Provider, content: bytes
) -> None:
    OnnxModel(classifier, provider)
    (entry,) = entries(classifier)
    entry.unlink()
    bad = entry.parent / f"{entry.name.rsplit('.', 1)[0]}.{zlib.crc32(content):08x}"
    bad.write_bytes(content)
    OnnxModel(classifier, provider).run(images=pixels(2, 8, 8, 3))
    assert "the graph is optimised again" in caplog.text
    assert bad not in entries(classifier) and len(entries(classifier)) == 1


@pytest.mark.parametrize("provider", ON_CPU)
def test_entries_of_others_are_not_taken(classifier: Path, monkeypatch: pytest.MonkeyPatch, provider: Provider) -> None:
    """Of an artefact that stood there before, of another version and of another CPU; only the last is kept."""
    outputs = OnnxModel(classifier, provider).outputs
    (first,) = entries(classifier)
    write_detector(classifier)
    assert OnnxModel(classifier, provider).outputs != outputs
    (second,) = entries(classifier)
    runtime = ort if provider == "cpu" else importlib.import_module("openvino")
    monkeypatch.setattr(runtime, "__version__", "0.1")
    OnnxModel(classifier, provider)
    (third,) = entries(classifier)
    monkeypatch.setattr(graph_cache, "_cpu", lambda: "another")
    OnnxModel(classifier, provider)
    assert len(entries(classifier)) == 2 and third in entries(classifier)
    assert len({first.name, second.name, third.name}) == 3


@pytest.mark.skipif(NO_OPENVINO, reason="no openvino")
def test_the_two_runtimes_keep_each_others_entries(classifier: Path) -> None:
    for provider in ("cpu", "openvino", "cpu", "openvino"):
        OnnxModel(classifier, provider)
    assert [path.name.split("-")[1] for path in entries(classifier)] == ["onnxruntime", "openvino"]


def test_where_entries_lie(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    OnnxModel(classifier, "cpu", cache=False)
    assert not classifier.with_name("m.onnx.cache").exists()

    classifier.with_name("m.onnx.cache").write_bytes(b"")  # no folder can be made there: the user's
    OnnxModel(classifier, "cpu")
    assert len(list((tmp_path / "user" / "cspnet").glob("m.onnx-*.cache/*"))) == 1

    monkeypatch.setenv("CSPNET_CACHE", str(tmp_path / "chosen"))
    OnnxModel(classifier, "cpu")
    other = write_detector(tmp_path / "folder" / "m.onnx")  # of one name
    OnnxModel(other, "cpu")
    assert len(list((tmp_path / "chosen").glob("m.onnx-*.cache/*"))) == 2
    assert not caplog.text

    monkeypatch.setenv("CSPNET_CACHE", str(classifier))  # a file
    for _ in range(2):
        assert OnnxModel(classifier, "cpu").run(images=pixels(1, 8, 8, 3))
    assert caplog.text.count("no cache of optimised graphs, for") == 1
    assert "cannot be written: set CSPNET_CACHE" in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(classifier: Path, tmp_path: Path) -> None:
    OnnxModel(classifier, "cpu")
    (entry,) = entries(classifier)
    classifier.parent.chmod(0o500)
    entry.parent.chmod(0o500)
    try:
        OnnxModel(classifier, "cpu")  # as delivered with its cache
        assert not (tmp_path / "user").exists()
    finally:
        classifier.parent.chmod(0o700)
        entry.parent.chmod(0o700)


def test_a_file_that_is_being_written_leaves_no_entry(tmp_path: Path) -> None:
    """What `write_aside` gives to export; it would lie there for good."""
    OnnxModel(write_classifier(tmp_path / ".m.abc.onnx"), "cpu")
    assert [path.name for path in tmp_path.iterdir()] == [".m.abc.onnx"]


def test_a_disk_that_is_full_costs_the_cache_alone(
    classifier: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert OnnxModel(classifier, "cpu").run(images=pixels(1, 8, 8, 3))
    assert "is not kept ([Errno 28] No space left on device)" in caplog.text
    assert entries(classifier) == []


def test_a_graph_that_no_runtime_takes_is_told_once(classifier: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, graph, artifact, _ = read_whole(classifier)
    graph.graph.node[0].op_type = "Nonsense"
    write_artifact(graph, artifact, classifier)
    with pytest.raises(InputError, match="is no graph that onnxruntime loads on CPU .*Nonsense"):
        OnnxModel(classifier, "cpu")
    assert not caplog.text and entries(classifier) == []


def test_work_of_killed_processes_is_removed(classifier: Path) -> None:
    folder = classifier.with_name("m.onnx.cache")
    for name, age in ((".new-old", 2 * graph_cache._ABANDONED_S), (".new-fresh", 0)):
        (folder / name).mkdir(parents=True)
        os.utime(folder / name, (time.time() - age,) * 2)
    OnnxModel(classifier, "cpu")
    assert [path.name for path in entries(classifier)][:-1] == [".new-fresh"]


@pytest.mark.slow
def test_processes_that_start_at_once(tmp_path: Path) -> None:
    """On an artefact that took the place of another, with that one's entry: all are right, one entry is left."""
    code = (
        "import sys, time, pathlib, numpy as np; from serving.runtime import OnnxModel\n"
        "path, start = map(pathlib.Path, sys.argv[1:])\n"
        "print('ready', flush=True)\n"
        "while not start.exists(): time.sleep(0.001)\n"
        "for _ in range(5):\n"
        "    found = OnnxModel(path, 'cpu', threads=1).run(images=np.full((2, 8, 8, 3), 32, np.uint8))\n"
        "    assert np.array_equal(found['logits'], np.full((2, 3), 2, np.float32)), found\n"
    )
    path = tmp_path / "m.onnx"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    OnnxModel(write_detector(path), "cpu")
    write_classifier(path)
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "start")]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    try:
        for process in running:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (tmp_path / "start").touch()
        for process in running:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
    finally:
        for process in running:
            process.kill()
            process.wait()
    (entry,) = entries(path)
    assert entry.name.endswith(f"{zlib.crc32(entry.read_bytes()):08x}")
