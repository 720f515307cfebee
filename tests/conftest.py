import contextlib
import io
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

# Ray reads it when a test module first imports it: under `uv run` it would copy this folder for its workers.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache of optimised graphs but beside an artefact and, second, below `tmp_path / "user"`."""
    monkeypatch.delenv("CSPNET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`exported("classifier")`, or of a detector's family: the artefact of a random network; flags of the command may
    follow.

    Each is exported by the command at most once in a session, since that takes long. Beside it lie its weights,
    `w.safetensors`, and what the command said, `said.txt`. Tests copy what they change.
    """

    @cache
    def export(name: str, *flags: str) -> Path:
        from exported import classifier_weights, detector_weights  # tests without an artefact start without it

        from serving.__main__ import main

        folder = tmp_path_factory.mktemp(name)
        weights, artifact, said = folder / "w.safetensors", folder / "m.onnx", io.StringIO()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            classifier_weights(weights) if name == "classifier" else detector_weights(weights, name)
        with contextlib.redirect_stdout(said):
            main(["export", "--weights", str(weights), "-o", str(artifact), *flags])
        (folder / "said.txt").write_text(said.getvalue())
        return artifact

    return export
