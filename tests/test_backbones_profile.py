import json
from functools import partial

import pytest
import torch

from backbones.__main__ import main
from backbones.blocks import DarkBlock
from backbones.cspnet import create_model
from backbones.profile import Profile, latencies, profile, render, table, training_mib
from backbones.published import PAPER, RELEASES
from backbones.variants import VARIANTS, Stem, Variant


@pytest.mark.parametrize(
    ("name", "size", "gmacs"),
    [
        ("cspresnet50", 224, 3.48),
        ("cspresnext50", 224, 3.11),
        ("cspdarknet50", 224, 5.04),
        ("cspresnet50", 256, 4.54),
        ("cspresnext50", 256, 4.05),
        ("cspdarknet50", 256, 6.57),
    ],
)
def test_published_gmacs(name, size, gmacs):
    assert profile(name, size).gmacs == pytest.approx(gmacs, rel=0.005)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_networks_cost_what_the_paper_says(name):
    # Its figures of DenseNet-201-Elastic count BatchNorm, ReLU and pools too: test_backbones_dense.py counts those.
    least = 0.97 if name == "cspdensenet201_elastic" else 0.99
    for model, published in zip((f"{name}_plain", name), PAPER[name], strict=True):
        cost = profile(model, published.size)
        assert cost.params == pytest.approx(published.params, rel=0.01), model
        assert least * published.bflops <= cost.bflops <= 1.01 * published.bflops, model


def test_counts_by_hand(monkeypatch):
    """A stem of 3x3x3x8 weights over 32 x 32 cells; over 16 x 16 a DarkNet stage of 3x3x8x16, 1x1x16x8 and 3x3x8x16."""
    tiny = Variant(
        block=DarkBlock, stem=Stem((8,), 3, 2), depths=(1,), channels=(16,), strides=(2,), bottleneck=0.5, fusion=None
    )  # fmt: skip
    monkeypatch.setitem(VARIANTS, "tiny", tiny)
    monkeypatch.setattr("backbones.profile.create_model", partial(create_model, levels=("c1", "c2")))
    weights = 216, 1152, 128, 1152, 16 * 1000
    cells = 1024, 256, 256, 256, 1
    outputs = 1024 * 8 + 256 * (16 + 8 + 16)
    cost = profile("tiny", 64)
    macs = sum(w * n for w, n in zip(weights, cells, strict=True))
    assert cost.params * 1e6 == pytest.approx(sum(weights) + 1000 + 2 * (8 + 16 + 8 + 16))
    assert cost.bflops * 1e9 == pytest.approx(2 * macs)
    assert cost.gmacs * 1e9 == pytest.approx(macs + 2 * outputs)
    assert cost.activations * 1e6 == pytest.approx(outputs + 1000)


def test_training_memory_is_what_a_real_step_keeps():
    model = create_model("cspresnet10").train()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        model(torch.randn(4, 3, 64, 64))
    activations = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in weights)
    expected = (8 * sum(parameter.numel() for parameter in model.parameters()) + activations) / 2**20
    assert training_mib("cspresnet10", 64, 4, torch.device("cpu")) == pytest.approx(expected, rel=0.02)


def test_latencies_are_of_all_models():
    times = latencies(["cspresnet10_plain", "cspresnet10"], 32, torch.device("cpu"), 1, runs=3)
    assert list(times) == ["cspresnet10_plain", "cspresnet10"]
    assert all(ms > 0 for ms in times.values())


SETTING = {"batch_size": 1, "training_batch": 32, "device": "cpu, 1 threads", "memory": "counted"}


def test_the_saving_is_by_hand():
    plain = {
        "model": "a_plain",
        **vars(Profile(10, 5, 10, 4)),
        "training_mib": 100,
        "size": 64,
        "setting": SETTING,
        "latency_ms": 20.0,
    }
    csp = {
        "model": "a",
        **vars(Profile(8, 4, 8, 5)),
        "training_mib": 50,
        "size": 64,
        "setting": SETTING,
        "latency_ms": 30.0,
    }
    line = render([plain, csp]).splitlines()[-1].split()
    assert line == [
        "saved",
        "by",
        "CSP",
        "20.0",
        "%",
        "20.0",
        "%",
        "20.0",
        "%",
        "-25.0",
        "%",
        "50.0",
        "%",
        "-50.0",
        "%",
    ]


def test_the_command_prints_and_writes(tmp_path, capsys):
    main(["profile", "cspresnet10", "--size", "64", "--runs", "0", "--json", str(tmp_path / "cost.json")])
    assert "saved by CSP" in capsys.readouterr().out
    rows = json.loads((tmp_path / "cost.json").read_text())
    assert [row["model"] for row in rows] == ["cspresnet10_plain", "cspresnet10"]
    assert "latency_ms" not in rows[0]
    with pytest.raises(SystemExit) as error:
        main(["profile", "--runs", "0"])
    assert error.value.code == 2
    assert "or --paper" in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_names_every_model_and_published_figure():
    text = table()
    for name in VARIANTS:
        assert f"\n{name} " in text
    for release in RELEASES.values():
        for published in release.figures:
            assert f"{published.top1:.3f}" in text
            assert f"{published.by}: {published.preprocess}" in text
