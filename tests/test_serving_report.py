import numpy as np
from PIL import Image

from serving.predictor import Detections
from serving.report import annotate, curves, write_page


def test_boxes_are_drawn_where_they_are_found():
    found = Detections(
        np.array([[10, 20, 40, 44]], np.float32), np.array([0.9], np.float32), np.array([1]), size=(50, 60)
    )
    image = annotate(Image.new("RGB", (60, 50)), found, ["cat", "dog"], zoom=2)
    assert image.size == (120, 100)
    drawn = np.asarray(image).any(axis=2)
    assert drawn[60:86, 20].all()  # the left side, x = 10
    assert not drawn[60:80, 30:70].any()  # nothing inside


def test_page_holds_everything_and_needs_nothing(tmp_path):
    figure = curves({"loss": {"classifier": [2.0, 1.0]}, "held out": {"top-1": [0.1, 0.9]}})
    pictures = [(Image.new("RGB", (8, 8)), "a <b>")]
    path = tmp_path / "index.html"
    write_page(path, "title", ("where", "top-1"), [("here & there", "0.5")], figure, pictures, ["a note"])
    text = path.read_text()
    assert "here &amp; there" in text
    assert "a &lt;b&gt;" in text
    assert text.count("data:image/") == 2
    assert "http" not in text.replace("http-equiv", "")
