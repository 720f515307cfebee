"""The pictures of docs/pictures that are not drawn by hand: a running service's page, and curves of an evaluation.

    python scripts/pictures.py ~/shapes    # the folder that docs/tutorial.md's commands were run in

Needs playwright, which the group `dev` has, and an installed Chromium.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from serving.config import ServingConfig
from serving.serve import start
from serving.shapes import draw_detection

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


def page(url: str, picture: Path) -> bytes:
    """A screenshot of the page once it has answered for a picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 860, "height": 860}, color_scheme="light")
        tab.goto(url)
        tab.set_input_files("#file", str(picture))
        tab.wait_for_selector("#drawn rect.edge", state="attached")
        shot = tab.screenshot()
        browser.close()
    return shot


def main(tutorial: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        draw_detection(Path(folder), {"val": 2}, seed=1, size=512)
        config = {"port": 0, "models": [{"name": "shapes", "artifact": str(tutorial / "shapes.onnx")}]}
        with start(ServingConfig.model_validate(config)) as service:
            shot = page(service.url, Path(folder) / "val/0001.jpg")
    pictures = {"page": io.BytesIO(shot), "precision_recall": tutorial / "runs/eval/report/precision_recall.png"}
    for name, source in pictures.items():
        with Image.open(source) as image:  # in few colours, a quarter as large
            image.convert("RGB").quantize(128).save(PICTURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
