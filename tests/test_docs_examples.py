"""The clients of docs/examples give a service's answer, all the same one; the notebook runs."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from artifacts import picture, write_detector

from serving.client import Client
from serving.config import ServingConfig
from serving.serve import start

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    artifact = write_detector(tmp_path_factory.mktemp("examples") / "m.onnx")
    config = {"port": 0, "models": [{"name": "things", "artifact": str(artifact)}]}
    with start(ServingConfig.model_validate(config)) as service:
        yield service.url


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    path.write_bytes(picture("red", (300, 200)))
    return path


def run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines_of(url: str, image: Path) -> str:
    """What the clients of Python and JavaScript print."""
    with Client(url) as client:
        found = client.detect("things", image, score_threshold=0.5)["detections"]
    assert len(found) == 2
    rows = [(box["label"], box["score"], " ".join(f"{value:.1f}" for value in box["box"])) for box in found]
    return "".join(f"{image}: {label} {score:.2f} at {corners}\n" for label, score, corners in rows)


@pytest.mark.parametrize("name", ["client.sh", "client.py", "client.mjs"])
def test_the_page_shows_each(name: str) -> None:
    assert f'--8<-- "examples/{name}"' in (EXAMPLES.parents[1] / "docs/examples/index.md").read_text()


def test_python(url: str, image: Path) -> None:
    said = run(image.parent, sys.executable, str(EXAMPLES / "client.py"), str(image), "--url", url, "--model", "things")
    assert said == lines_of(url, image)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_javascript(url: str, image: Path) -> None:
    assert run(image.parent, "node", str(EXAMPLES / "client.mjs"), str(image), url, "things") == lines_of(url, image)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(url: str, image: Path) -> None:
    answer = json.loads(run(image.parent, "bash", str(EXAMPLES / "client.sh"), str(image), url, "things"))
    with Client(url) as client:
        assert answer == client.detect("things", image, score_threshold=0.5)
    assert (image.parent / "annotated.png").read_bytes().startswith(b"\x89PNG")


def test_notebook(tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "networks.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    stored = [output["text"] for cell in cells for output in cell.get("outputs", []) if output.get("name") == "stdout"]
    assert run(tmp_path, sys.executable, "-c", "\n\n".join(code)) == "".join(line for text in stored for line in text)
