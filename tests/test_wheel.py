"""The wheel holds the packages with their data and nothing else, and what is installed from it runs from anywhere."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("backbones", "configs", "detection", "serving")
UV = shutil.which("uv")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(UV is None and importlib.util.find_spec("pip") is None, reason="neither uv nor pip"),
]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, since a build leaves folders behind; with compiled modules, and with what is not shipped."""
    folder = tmp_path_factory.mktemp("wheel") / "source"
    for name in (*SHIPPED, "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for package in {path.parent for path in folder.rglob("*.py")}:
        (package / "__pycache__").mkdir(exist_ok=True)
        (package / "__pycache__" / "gone.cpython-311.pyc").write_bytes(b"compiled")
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    built = source.with_name("built")
    if UV:
        run(UV, "build", "--wheel", "--python", sys.executable, "--out-dir", built, source, cwd=source)
    else:
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", built, source, cwd=source)
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """What is on the path in place of the source; its dependencies are this environment's."""
    folder = wheel.parents[1] / "installed"
    tool = [UV, "pip", "install", "--python", sys.executable] if UV else [sys.executable, "-m", "pip", "install"]
    run(*tool, "--no-deps", "--target", folder, wheel, cwd=wheel.parent)
    return folder


def python(installed: Path, cwd: Path, *arguments: str | Path) -> str:
    return run(sys.executable, *arguments, cwd=cwd, PYTHONPATH=str(installed))


def test_holds_the_packages_with_their_data_and_nothing_else(source: Path, wheel: Path) -> None:
    wanted = {
        path.relative_to(source).as_posix()
        for name in SHIPPED
        for path in (source / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"backbones/imagenet_wnids.txt", "configs/coco/fcos.yaml", "serving/service/page.html"} <= wanted
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == wanted


def test_what_is_installed_is_what_runs(installed: Path, tmp_path: Path) -> None:
    for package in ("backbones", "detection", "serving"):
        found = python(installed, tmp_path, "-c", f"import {package}; print({package}.__file__)")
        assert Path(found.strip()) == installed / package / "__init__.py"


def test_commands_run_from_anywhere(installed: Path, tmp_path: Path) -> None:
    assert "--output" in python(installed, tmp_path, "-m", "serving", "quickstart", "--help")
    assert "cspresnet50" in python(installed, tmp_path, "-m", "backbones", "models")
    config = installed / "configs/serving/cluster.yaml"
    assert "import_path: serving.deploy:" in python(installed, tmp_path, "-m", "serving", "deploy-config", config)
