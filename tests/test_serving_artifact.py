import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from artifacts import write_classifier, write_detector
from onnx import TensorProto, helper

import serving.artifact
from backbones.errors import InputError
from serving.artifact import SEAL_KEY, from_metadata, read_artifact, read_whole, to_metadata, write_artifact

SEAL_SIZE = 83


def refused(path: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as error:
        read_artifact(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.fixture
def path(tmp_path) -> Path:
    return write_detector(tmp_path / "m.onnx")


def test_what_was_written_comes_back_with_the_files_hash(path):
    artifact, digest = read_artifact(path)
    assert (artifact.model, artifact.classes, artifact.canvases) == ("boxes", ("cat", "dog"), ((128, 128),))
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert from_metadata(to_metadata(artifact), "here") == artifact


def test_the_seal_is_metadata_to_every_other_reader(path):
    content = path.read_bytes()
    sealed = {entry.key: entry.value for entry in onnx.load(path).metadata_props}[SEAL_KEY]
    assert sealed == hashlib.sha256(content[:-SEAL_SIZE]).hexdigest()
    onnx.checker.check_model(str(path))


def test_written_again_it_has_the_same_bytes_and_one_seal(path):
    before = path.read_bytes()
    _, graph, artifact, _ = read_whole(path)
    write_artifact(graph, artifact, path)
    assert path.read_bytes() == before


def test_any_changed_byte_is_refused(path):
    """Each byte of a small file: of the graph, its weights, the metadata and the seal itself."""
    content = path.read_bytes()
    flips = np.random.default_rng(0).integers(1, 256, len(content))
    for i, flip in enumerate(flips.tolist()):
        path.write_bytes(content[:i] + bytes([content[i] ^ flip]) + content[i + 1 :])
        with pytest.raises(InputError):
            read_artifact(path)


def test_changed_weights_are_refused_with_both_hashes(tmp_path):
    path = write_classifier(tmp_path / "c.onnx")  # 2 MB of weights
    content = bytearray(path.read_bytes())
    sealed = content[-64:].decode()
    for i in np.random.default_rng(1).integers(1000, len(content) - 2000, 5).tolist():
        content[i] ^= 1
        path.write_bytes(content)
        refused(path, f"was changed: its SHA-256 is [0-9a-f]{{64}}, its seal says '{sealed}': copy the file again")
        content[i] ^= 1


def test_any_shortened_file_is_refused(path):
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError):
            read_artifact(path)
    path.write_bytes(content + b"\n")
    with pytest.raises(InputError):
        read_artifact(path)


def test_each_mistake_has_its_line(path, tmp_path):
    content = path.read_bytes()
    refused(tmp_path / "none.onnx", "no artefact at .*: make one with `python -m serving export`")
    refused(path / "none.onnx", "no artefact at .*: make one with `python -m serving export`")
    refused(tmp_path, "cannot read .*: give an .onnx file")
    refused(tmp_path / ("x" * 300), r"cannot read .* \(File name too long\): give an .onnx file")
    path.write_bytes(b"")
    refused(path, "is empty: copy the file again")
    path.write_bytes(b"\x89PNG\r\n" + content)
    refused(path, "was changed")
    path.write_text("no graph at all")
    refused(path, "is no ONNX file, or only the beginning of one")
    path.write_bytes(content[:500])
    refused(path, "is no ONNX file, or only the beginning of one")
    path.write_bytes(content[:-SEAL_SIZE])
    refused(path, "lost its seal, so it was cut short or changed")


def test_foreign_files_and_those_of_other_versions(path, monkeypatch):
    _, graph, artifact, _ = read_whole(path)
    said = json.loads(to_metadata(artifact)["cspnet"])

    def of(**changes: object) -> dict[str, str]:
        return {"cspnet": json.dumps(said | changes)}

    for metadata, match in (
        ({}, "carries no cspnet metadata: export it with"),
        (of(schema_version=3), "is of a newer cspnet, metadata version 3, not 2: update cspnet"),
        (of(schema_version=1), "is of an older cspnet, metadata version 1, not 2: export it again"),
        (of(schema_version="2"), "has broken metadata .*schema_version is '2'.*: export it again"),
        (of(task="song"), r"has broken metadata \(Input tag 'song' .*\): export it again"),
        (of(category_ids=[1]), "has broken metadata .*classes have 1 category_ids.*: export it again"),
        (of(canvases=None), "has broken metadata .*canvases.*: export it again"),
        (of(mood="good"), "has broken metadata .*mood.*: export it again"),
        ({"cspnet": "{"}, "has broken metadata"),
        ({"cspnet": "[]"}, "has broken metadata"),
        ({"cspnet": "null"}, "has broken metadata"),
    ):
        monkeypatch.setattr(serving.artifact, "to_metadata", lambda _, metadata=metadata: metadata)
        write_artifact(graph, artifact, path)
        refused(path, match)


def test_a_foreign_file_without_a_seal(path):
    graph = read_whole(path).graph
    del graph.metadata_props[:]
    onnx.save(graph, path)
    refused(path, "carries no cspnet metadata")


@pytest.mark.parametrize("location", ("/etc/passwd", "../secret.bin", "weights.bin"))
@pytest.mark.parametrize("where", ("initializer", "attribute", "subgraph", "sparse"))
def test_data_in_other_files_is_refused_wherever_it_is(path, location, where):
    _, graph, artifact, _ = read_whole(path)
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    constant = helper.make_node("Constant", [], ["w"])
    constant.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=tensor))
    if where == "initializer":
        graph.graph.initializer.append(tensor)
    elif where == "attribute":
        graph.graph.node.append(constant)
    elif where == "subgraph":
        body = helper.make_graph([constant], "body", [], [])
        graph.graph.node.append(helper.make_node("If", ["go"], ["w2"], then_branch=body, else_branch=body))
    else:
        graph.graph.sparse_initializer.append(onnx.SparseTensorProto(values=tensor, dims=[4]))
    write_artifact(graph, artifact, path)
    refused(path, f"keeps data in another file, '{location}', which is not opened")
