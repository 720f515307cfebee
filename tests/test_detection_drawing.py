import numpy as np
from PIL import Image

from detection.drawing import draw_boxes


def test_boxes_and_texts_lie_inside_and_the_later_on_top():
    image = Image.new("RGB", (200, 100))
    boxes = [[50, 40, 90, 80], [50, 40, 90, 80], [-20, -30, 30, 20], [180, 90, 260, 140]]
    draw_boxes(image, boxes, ["cat", "cat", "dog", "a long name"], ["#ff0000", "#00ff00", "#0000ff", "white"])
    pixels = np.asarray(image)
    assert (pixels[60, 50] == (0, 255, 0)).all()
    assert not (pixels == (255, 0, 0)).all(axis=2).any()
    assert not pixels[45:75, 55:85].any()  # nothing inside
    assert (pixels[:8, :40] == (0, 0, 255)).all(axis=2).sum() > 50  # its text is moved into the picture
    assert (pixels[80:, 120:] == 255).all(axis=2).sum() > 200
    assert pixels[80:, 120:].min() == 0  # black on white


def test_what_cannot_be_drawn_is_left_out():
    image = Image.new("RGB", (50, 50))
    boxes = [[float("nan"), 0, 5, 5], [0, 0, float("inf"), 5], [20, 20, 10, 30], [0, 0, 1e12, 9]]
    draw_boxes(image, boxes, ["a"] * 4, ["red"] * 4)
    draw_boxes(image, [], [], [])
    assert not np.asarray(image).any()
