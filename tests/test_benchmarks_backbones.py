import json

import pytest

from backbones.errors import InputError
from backbones.published import PAPER, RELEASES
from benchmarks import backbones


def test_published_accuracies_have_their_publisher_and_size():
    first, second = backbones.of_ours("cspdarknet53")  # an alias
    assert first == {"by": "timm", "size": 256, "top1": RELEASES["cspdarknet50"].figures[0].top1}
    assert second["by"] == "mmpretrain"
    assert backbones.of_ours("csppeleenet") == [
        {"by": "the authors", "size": 224, "top1": PAPER["csppeleenet"][1].top1}
    ]
    assert backbones.of_ours("cspresnet10") == []
    with pytest.raises(InputError, match="nonesuch"):
        backbones.of_ours("nonesuch")
    found = {figure["by"]: figure for figure in backbones.of_torchvision("resnet50")}
    assert found["torchvision, IMAGENET1K_V1"] == {"by": "torchvision, IMAGENET1K_V1", "size": 224, "top1": 76.13}
    assert len(found) == 2


def test_a_table_of_costs_and_one_of_speeds():
    def turns(name: str, **over: float) -> dict:
        speeds = {name: 20.0} | {other: 20 / value for other, value in over.items()}
        spread = {other: [value - 0.1, value + 0.1] for other, value in over.items()}
        return {"runtime": "eager", "batch": 8, "images_per_s": speeds, "ours_over": over, "spread": spread}

    figures = [
        {"by": "timm", "size": 256, "top1": 79.5, "gmacs": 4.5},
        {"by": "the authors", "size": 224, "top1": 76.6, "gmacs": 3.5},
    ]
    result = {
        "settings": {"size": 224},
        "models": {
            "ours": {
                "params": 21.6, "gmacs": 3.5, "published": figures, "speeds": [turns("ours", resnet50=1.2, timm=1.0)],
            },
            "resnet50": {"params": 25.6, "gmacs": 4.1, "published": [], "speeds": [turns("resnet50")]},
        },
    }  # fmt: skip
    lines = backbones.markdown(result).splitlines()
    published = "79.5 by timm at 256² (4.50 GMACs); 76.6 by the authors at 224²"
    assert f"| ours | 21.60 | 3.50 | {published} |" in lines
    assert "| resnet50 | 25.60 | 4.10 | – |" in lines
    assert "| ours | eager | 8 | 50.0 | 20.0 | 1.20 (1.10…1.30) | 1.00 (0.90…1.10) |" in lines
    assert "| resnet50 | eager | 8 | 50.0 | 20.0 | – | – |" in lines


@pytest.mark.slow
def test_a_small_network_on_each_runtime(tmp_path, capsys):
    arguments = ["--models", "cspresnet10", "--size", "64", "--rounds", "1", "--no-compile"]
    backbones.main([*arguments, "--json", str(tmp_path / "x.json")])
    figures = json.loads((tmp_path / "x.json").read_text())["models"]["cspresnet10"]
    assert [(row["runtime"], row["batch"]) for row in figures["speeds"]] == [
        (runtime, batch) for runtime in ("eager", "onnxruntime", "OpenVINO") for batch in (1, 8)
    ]
    assert all(set(row["ours_over"]) == {"resnet50"} for row in figures["speeds"])
    assert "| cspresnet10 | OpenVINO | 8 |" in capsys.readouterr().out
