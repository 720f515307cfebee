"""The house's rules: which way imports go, and what starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("backbones", "detection", "serving")  # each may import from those before it
WITHOUT_TORCH = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
                 if "no torch" in (ast.get_docstring(ast.parse(path.read_text())) or "")]  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package):
    above = PACKAGES[PACKAGES.index(package) + 1 :]
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [module for module in modules if module.split(".")[0] in above], path


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_hold_a_docstring_only(package):
    for path in (ROOT / package).rglob("__init__.py"):
        assert len(ast.parse(path.read_text()).body) == 1, path


def test_what_a_replica_or_worker_needs_starts_without_torch():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in WITHOUT_TORCH]
    assert {"serving.predictor", "serving.app", "serving.batch", "serving.client", "backbones.preprocess"} <= set(names)
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
