import json

import pytest

from benchmarks import coco_metric

SMALL = ["--images", "4", "--objects", "20", "--categories", "3", "--detections", "10", "--rounds", "2"]


def test_both_are_timed_and_their_figures_are_the_same(tmp_path):
    coco_metric.main([*SMALL, "--json", str(tmp_path / "x.json")])
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["largest_difference"] <= 1e-9
    assert [len(values) for values in result["all_seconds"].values()] == [2, 2]
    assert 0 < result["figures"]["AP50"] <= 1


def test_a_difference_in_any_round_is_a_failure(monkeypatch, tmp_path):
    plain, turns = coco_metric.plain, []

    def wrong_once(path, results):
        turns.append(1)
        figures = plain(path, results)
        return figures | {"APs": figures["APs"] + 1e-6} if len(turns) == 1 else figures

    monkeypatch.setattr(coco_metric, "plain", wrong_once)
    with pytest.raises(SystemExit) as stop:
        coco_metric.main([*SMALL, "--json", str(tmp_path / "x.json")])
    assert stop.value.code == 1
    assert json.loads((tmp_path / "x.json").read_text())["largest_difference"] == pytest.approx(1e-6)
