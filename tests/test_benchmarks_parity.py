import json
from pathlib import Path

import pytest
import torch

from benchmarks import parity
from serving.shapes import draw_classification

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart" / "classifier.yaml"


def row(model: str, **largest: float) -> dict:
    metric = {"AP50": 0.5} if "boxes" in largest else {"top-1": 0.75}
    return {
        "model": model, "precision": "fp32", "provider": "cpu", "batch_size": 3, "images": 7, "detections": 20,
        "unmatched": 1, "largest": largest, "pytorch": metric, "artifact": {k: v + 0.001 for k, v in metric.items()},
    }  # fmt: skip


def test_a_table_of_both_tasks():
    head, line, *rows = parity.markdown([row("a", logits=1e-6), row("b", scores=2e-5, boxes=0.0012)]).splitlines()
    names = [cell.strip() for cell in head.strip("|").split("|")]
    assert names[6:] == ["unmatched", "logits", "scores", "boxes", "top-1", "AP50"]
    assert len({text.count("|") for text in (head, line, *rows)}) == 1
    assert "0.7500, 0.7510, +1.0e-03" in rows[0] and "1.2e-03" in rows[1]


def test_a_detector_sees_each_image_once():
    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, images):
            self.calls += 1
            return [images[0].sum()]

    model, image = Counting(), torch.arange(24).view(2, 4, 3).permute(2, 0, 1)
    remembering = parity.remembering(model)
    assert [remembering([pixels])[0].item() for pixels in (image, image + 1, image.clone())] == [276, 300, 276]
    assert model.calls == 2


@pytest.mark.slow
def test_an_artefact_beside_its_weights(exported, tmp_path, capsys):
    draw_classification(tmp_path / "c", {"val": 12}, seed=1, size=48)
    artifact = exported("classifier")
    for triangle in (tmp_path / "c" / "val" / "triangle").iterdir():
        triangle.unlink()  # the tiny classifier has three classes
    (tmp_path / "c" / "val" / "triangle").rmdir()
    arguments = [
        "--model", f"tiny={artifact.with_name('w.safetensors')}", "--artifact", f"tiny={artifact}",
        "--images", str(tmp_path / "c"), "--limit", "5", "--batch-sizes", "1", "3", "--json", str(tmp_path / "x.json"),
        "--config", str(CONFIG), f"data.root={tmp_path / 'c'}", "num_classes=3",
    ]  # fmt: skip
    parity.main(arguments)
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [(row["provider"], row["batch_size"], row["images"]) for row in rows] == [("cpu", 1, 5), ("cpu", 3, 5)]
    for row in rows:
        assert 0 < row["largest"]["logits"] < 1e-4
        assert row["pytorch"] == row["artifact"] and 0 <= row["pytorch"]["top-1"] <= 1
    assert "| tiny | fp32 | cpu | 1 |" in capsys.readouterr().out
