import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import plain


def test_the_reason_is_the_first_causes():
    try:
        try:
            raise ValueError("\n  cannot guard on 4*u1 > 4000\nsee the manual")
        except ValueError as cause:
            raise RuntimeError("step 1 of 3 failed") from cause
    except RuntimeError as error:
        assert plain.reason(error) == "ValueError: cannot guard on 4*u1 > 4000"
    assert plain.reason(KeyError()) == "KeyError: no reason given"
    assert len(plain.reason(OSError("x" * 500))) == len("OSError: ") + plain.SHOWN


def test_answers_that_are_others_are_no_race():
    model, images = nn.Flatten(), torch.rand(2, 3, 4, 4)
    right = images.flatten(1).numpy()
    assert plain.compare(model, lambda _: [right], images) == 0
    assert 0 < plain.compare(model, lambda _: [right + 1e-4], images) < 1e-3
    with pytest.raises(plain.Differs, match="off PyTorch's"):
        plain.compare(model, lambda _: [np.zeros_like(right)], images)


def test_a_network_that_cannot_be_converted_has_a_reason_instead(monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("no such operator")

    def works(model, example, path):
        return lambda images: [model(images).numpy()]

    def zeros(model, example, path):
        return lambda images: [torch.zeros_like(model(images)).numpy()]

    ways = {"first": (plain.ONNX, fails), "second": (plain.ONNX, works), "third": (plain.ONNX, fails)}
    monkeypatch.setattr(plain, "WAYS", ways | {"other": ("wrong", zeros)})
    pixels = torch.randint(0, 256, (1, 4, 4, 3), dtype=torch.uint8)
    entries, rows = plain.conversions(
        nn.Flatten(), lambda x: x.permute(0, 3, 1, 2).float(), pixels, tmp_path / "m.onnx"
    )
    assert [row["way"] for row in rows] == ["first", "second", "other"]
    assert rows[0]["problem"] == "RuntimeError: no such operator"
    assert rows[1]["off"] == 0 and rows[2]["problem"].startswith("Differs")
    assert entries.keys() == {plain.ONNX} and entries[plain.ONNX]() == 1

    entries, rows = plain.conversions(
        nn.Flatten(), lambda x: x.permute(0, 3, 1, 2).float(), pixels.repeat(2, 1, 1, 1), tmp_path
    )
    assert [row["way"] for row in rows] == ["other"]  # ONNX is of one image

    *_, good, bad = plain.markdown(
        [
            ("net", {"way": "a", "batch": 1, "seconds": 2.0, "off": 0.01}),
            ("net", {"way": "b", "batch": 8, "problem": "A|B"}),
        ]
    )
    assert good == "| net | 1 | a | 2 | 0.01 |"
    assert bad == r"| net | 8 | b |  | A\|B |"
