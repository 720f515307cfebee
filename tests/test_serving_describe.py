import json
import subprocess
import sys

import onnx
import pytest
from artifacts import write_classifier, write_detector

from serving.__main__ import main
from serving.artifact import Quantization, read_artifact, read_whole, write_artifact
from serving.describe import describe, picture


def test_pictures():
    assert picture(["a"], "net", ["x"]) == ["  a ─── net ─── x"]
    assert picture(["a", "b"], "net", ["x", "y", "z", "w"]) == [
        "             ┌─ x",
        "  a ─┬─ net ─┼─ y",
        "  b ─┘       ├─ z",
        "             └─ w",
    ]


@pytest.mark.parametrize("inputs", (1, 2, 3))
@pytest.mark.parametrize("outputs", (1, 2, 5))
def test_every_picture_joins_all_that_it_shows(inputs, outputs):
    """Each line end meets another: what goes right is met by what goes left, and down by up."""
    names = [f"in{i}" for i in range(inputs)]
    lines = picture(names, "net", [f"out{i}" for i in range(outputs)])
    assert sum(name in line for name in names for line in lines) == inputs
    wide = max(map(len, lines)) + 1
    grid = [line.ljust(wide) for line in lines]
    down, up = set("┐┌┤├┬┼│"), set("┘└┤├┴┼│")
    for y, line in enumerate(grid):
        for x, char in enumerate(line):
            below = grid[y + 1][x] if y + 1 < len(grid) else " "
            assert (char in down) == (below in up), "\n".join(lines)


def test_description_counts_the_graph(tmp_path):
    path = write_detector(tmp_path / "m.onnx")
    told = describe(path)
    assert told["inputs"][0] == {"name": "images", "type": "uint8", "shape": ["N", "H", "W", 3]}
    assert told["outputs"][0] == {"name": "boxes", "type": "float32", "shape": ["N", 2, 4]}
    assert told["operators"]["Expand"] == 3
    assert sum(told["operators"].values()) == len(onnx.load(path).graph.node)
    assert told["parameters"] == 8 + 2  # boxes and scores; what is of int64 are shapes and labels
    assert told["bytes"] == path.stat().st_size
    assert told["sha256"] == read_artifact(path)[1]


def test_command_says_it_in_lines_and_in_json(tmp_path, capsys):
    path = write_detector(tmp_path / "m.onnx")
    _, graph, artifact, _ = read_whole(path)
    made = Quantization(
        method="entropy",
        images=9,
        kept_float=2,
        metric="AP50",
        before=0.5,
        after=0.49,
        evaluated=72,
        speedup={1: 2.5, 8: 3},
    )
    many = tuple(f"class {i}" for i in range(80))
    about = {"quantization": made, "precision": "int8", "classes": many, "category_ids": tuple(range(80))}
    write_artifact(graph, artifact.model_copy(update=about), path)
    main(["inspect", str(path)])
    text = capsys.readouterr().out
    assert "m.onnx: boxes, detection, int8" in text
    assert "80: class 0, " in text and "class 7 and 72 more" in text
    assert "entropy over 9 images, 2 operators in float: AP50 0.5000 before, 0.4900 after on 72 images; 2.50" in text
    assert "2.50 and 3.00 times as fast at batch 1, 8" in text
    main(["inspect", "--json", str(path)])
    assert json.loads(capsys.readouterr().out)["metadata"]["classes"] == list(many)


def test_classifier_too(tmp_path, capsys):
    main(["inspect", str(write_classifier(tmp_path / "c.onnx"))])
    assert "images uint8 [N, H, W, 3] ─── colours ─┬─ logits        float32 [N, 3]" in capsys.readouterr().out


def test_bad_files_end_with_one_line_and_status_2(tmp_path, capsys):
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(tmp_path / "m.onnx")])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/m.onnx is empty")


def test_needs_neither_torch_nor_onnxruntime(tmp_path):
    path = write_detector(tmp_path / "m.onnx")
    code = (
        "import sys; from serving.__main__ import main; main(sys.argv[1:]); "
        "sys.exit(bool({'torch', 'onnxruntime'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, "inspect", str(path)], check=True, capture_output=True)
