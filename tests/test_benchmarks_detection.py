import json

import pytest
import torch

from backbones.errors import InputError
from benchmarks import detection
from benchmarks.detection import agreement, main
from detection.profile import profile

TINY = ["--models", "cspresnet10", "--size", "128", "--batch-size", "1", "--rounds", "1", "--device", "cpu"]


@pytest.mark.slow
def test_both_parts_run_and_say_what_was_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detection, "BATCH", 2)
    main([*TINY, "--json", str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    for task in result["peer"]["cspresnet10"].values():
        names = "fasterrcnn_cspresnet10_fpn", "fasterrcnn_resnet50_fpn"
        for name, regions, gmacs in zip(names, task["regions"], task["gmacs"], strict=True):
            assert 0 < regions <= 1000
            assert gmacs == profile(name, [(128, 128)], proposals=regions).gmacs[0]
        assert task["met"] == (task["ratios"]["time_over_gmacs"] <= 1.05)
    for form in result["forms"].values():
        assert form["detections"] == form["shared"] > 0
        assert form["met"] == (form["ours_over"]["list"] >= 1)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.endswith(" met |")]
    assert len(rows) == 2 + len(detection.FAMILIES)


def test_level_scores_find_as_much_as_there_are_regions():
    for model in (
        detection.create_detector("fasterrcnn_cspresnet10_fpn", fpn_channels=64),
        detection.tv.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None),
    ):
        detection.level_scores(model)
        with torch.no_grad():
            scores = model.eval().roi_heads.box_predictor(torch.rand(7, 1024))[0].softmax(-1)
        above = scores[:, 1:] > model.roi_heads.score_thresh
        assert above.sum(1).tolist() == [1] * 7


def rows(*detections: tuple[float, float, int]) -> dict[str, torch.Tensor]:
    """Of each detection where its box starts, its score and its class."""
    x, scores, labels = (torch.tensor([d[i] for d in detections]) for i in range(3))
    return {"boxes": x[:, None] + torch.tensor([0.0, 0, 8, 8]), "scores": scores, "labels": labels}


def test_agreement_is_one_to_one():
    expected = rows((0.0, 0.9, 1), (20.0, 0.8, 1), (40.0, 0.7, 2))
    assert agreement([expected], [expected]) == {"detections": 3, "shared": 3}
    twice = rows((0.0, 0.9, 1), (0.0, 0.9, 1), (20.0, 0.8, 1), (40.0, 0.7, 2))
    assert agreement([twice], [expected]) == {"detections": 4, "shared": 3}
    other = rows((0.0, 0.5, 1), (20.0, 0.8, 2), (40.01, 0.7, 2))  # a score, a class, a box
    assert agreement([other], [expected]) == {"detections": 3, "shared": 0}
    nothing = {key: value[:0] for key, value in expected.items()}
    assert agreement([nothing, nothing], [expected, nothing]) == {"detections": 3, "shared": 0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_device_that_is_not_there_is_said_in_a_line():
    with pytest.raises(InputError, match="device=cuda is not usable here"):
        main([*TINY, "--device", "cuda"])
