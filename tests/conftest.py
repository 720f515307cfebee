import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ON_RAY = {
    f"test_serving_{name}"
    for name in (
        "app", "batch", "batch_killed", "cluster", "evaluate", "grpc", "observe", "prove", "resilience", "rollout",
        "scaling", "serve",
    )
}  # fmt: skip
ON_RAY |= {"test_docs_tutorial", "test_docs_examples"}
WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # such as gw0; None in one process alone
# Ray reads it when a test module first imports it: under `uv run` it would copy this folder for its workers.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def pytest_configure(config: pytest.Config) -> None:
    """One thread for PyTorch in each of several workers, which share the cores, and in what their tests start."""
    if getattr(config.option, "numprocesses", None):
        os.environ["OMP_NUM_THREADS"] = "1"  # workers start with it


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker takes a file's tests, which share fixtures; one those on Ray; and one those of a family's artefact."""
    for item in items:
        group = "ray" if item.path.stem in ON_RAY else item.path.stem
        if isinstance(item, pytest.Function) and "exported" in item.fixturenames and hasattr(item, "callspec"):
            group = item.callspec.params.get("family", group)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def _alike() -> Iterator[None]:
    """Each test begins alike, whatever those before it in this worker did: same seed, same number of threads."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache of optimised graphs but beside an artefact and, second, below `tmp_path / "user"`."""
    monkeypatch.delenv("CSPNET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`exported("classifier")`, or of a detector's family: the artefact of a random network; flags of the command may
    follow.

    Each is exported by the command once in a session, whichever worker is the first to ask, since that takes long.
    Beside it lie its weights, `w.safetensors`, and what the command said, `said.txt`. Tests copy what they change.
    """
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if WORKER else own

    def export(name: str, *flags: str) -> Path:
        folder = shared / "".join(["exported-", name, *flags])
        weights, artifact, said = folder / "w.safetensors", folder / "m.onnx", folder / "said.txt"
        with FileLock(f"{folder}.lock"):
            if not said.exists():
                folder.mkdir()
                said.write_text(_export(name, weights, artifact, flags))
        return artifact

    return export


def _export(name: str, weights: Path, artifact: Path, flags: Sequence[str]) -> str:
    from exported import classifier_weights, detector_weights  # tests without an artefact start without it

    from serving.__main__ import main

    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier_weights(weights) if name == "classifier" else detector_weights(weights, name)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(["export", "--weights", str(weights), "-o", str(artifact), *flags])
    return said.getvalue()
