import json
import time
from functools import partial

import pytest
import torch

from benchmarks import export
from benchmarks.contest import ratio, take_turns


def test_ratios_are_of_the_firsts_speed():
    def sleep(seconds: float):
        return lambda: time.sleep(seconds) or 4  # images

    turns = take_turns({"ours": sleep(0.001), "theirs": sleep(0.02)}, rounds=3)
    assert turns["ours_over"]["theirs"] > 3
    assert turns["images_per_s"]["theirs"] < 4 / 0.02
    low, high = turns["spread"]["theirs"]
    assert low <= turns["ours_over"]["theirs"] <= high
    assert ratio(turns, "theirs").startswith(f"{turns['ours_over']['theirs']:.2f} (")
    assert ratio(turns, "absent") == "–"


def test_pytorch_has_its_weights_channels_last(tmp_path):
    for make, name in ((export.random_classifier, "cspresnet10"), (export.random_detector, "fcos_cspresnet10_fpn")):
        model, pixels = make(name, tmp_path / "w.safetensors")
        weights = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
        assert len(weights) > 20
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
        if name == "fcos_cspresnet10_fpn":
            with torch.inference_mode():
                assert len(model(export.as_list(pixels))[0]["boxes"]) > 10
            assert export.detectors(model, pixels, compile_too=False)["eager"]() == 1
        else:
            assert export.classifiers(model, pixels, compile_too=False)["eager"]() == 1


def test_what_is_timed_is_what_was_compiled(monkeypatch):
    """With the weights frozen: compiled again in a turn, for another mode, it would be without."""
    graphs: list[bool] = []

    def backend(module, _):
        graphs.append(torch._inductor.config.freezing and not torch.is_grad_enabled())
        return module.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    work = export.compiled(torch.nn.Linear(3, 2).eval(), (torch.ones(4, 3),), compile_too=True)["compiled"]
    assert (work(), work()) == (4, 4)
    assert graphs == [True]


@pytest.mark.slow
def test_a_table_of_a_small_classifier(tmp_path, capsys):
    arguments = ["--models", "cspresnet10", "--batch-sizes", "2", "--rounds", "1", "--no-compile", "--no-plain"]
    export.main([*arguments, "--json", str(tmp_path / "x.json")])
    model = json.loads((tmp_path / "x.json").read_text())["models"]["cspresnet10"]
    figures = model["batches"]["2"]
    assert set(figures["ours_over"]) == {"OpenVINO", "INT8", "eager", "a core an image"}
    assert all(value > 0 for value in figures["images_per_s"].values())
    for precision, convolution in (("float", "Conv"), ("INT8", "QLinearConv")):
        shares = model["operators"][precision]
        assert next(iter(shares)) == convolution
        assert sum(shares.values()) == pytest.approx(1)
    printed = capsys.readouterr().out
    assert "| cspresnet10 | 2 |" in printed and "| cspresnet10 | INT8 | QLinearConv " in printed
