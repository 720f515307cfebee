"""Servers of one artefact that the benchmark starts and ends, each in a process of its own: ours and its peers.

A peer is the package of the registry in an environment of its own, made here by uv in the user's cache.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from backbones.errors import InputError
from benchmarks.load import Post
from benchmarks.processes import memory_mb, tree
from serving.artifact import ClassifierArtifact, read_artifact
from serving.service.environment import free_port
from serving.sessions.providers import usable_cores

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cspnet-peers"
COMMON = ("onnxruntime", "pillow", "numpy")
START_TIMEOUT_S = 240
STOP_TIMEOUT_S = 20
SETTLE_S = 15  # Ray's own processes are busy for some seconds after they have started
FORM = "multipart/form-data; boundary=cspnet"


@dataclass(frozen=True)
class Peer:
    """A package and the command that serves `benchmarks/peers/…` on $PORT."""

    package: str
    command: tuple[str, ...]  # of the environment's bin folder
    path: str = "/classify"
    form: bool = True  # a form's field `image`, not the body itself


PEERS = {
    "Ray Serve, defaults": Peer("ray[serve]==2.60.0", ("python", "ray_serve.py"), "/", form=False),
    "LitServe": Peer("litserve python-multipart", ("python", "litserve_server.py"), "/predict"),
    "BentoML": Peer("bentoml", ("bentoml", "serve", "bentoml_service:Classifier", "--port", "$PORT")),
    "FastAPI": Peer(
        "fastapi uvicorn[standard] python-multipart",
        ("uvicorn", "fastapi_app:app", "--port", "$PORT", "--workers", str(usable_cores()), "--no-access-log"),
    ),
}


@dataclass(frozen=True)
class Running:
    """A server that answers `post`; `cold_start_s` from its command to its first answer."""

    post: Post
    pid: int
    cold_start_s: float

    def memory_mb(self) -> float:
        """Of all its processes, what they share counted once."""
        return memory_mb(self.pid)


@contextlib.contextmanager
def ours(models: dict[str, Path], folder: Path, picture: Path, **settings: object) -> Iterator[dict[str, Running]]:
    """This project's server, at its defaults, by model name.

    Args:
        settings: of each model, over the defaults.
    """
    port = str(free_port())
    config, posts = folder / "serving.yaml", {}
    said = [{"name": name, "artifact": str(path), **settings} for name, path in models.items()]
    config.write_text(yaml.safe_dump({"port": int(port), "models": said}))
    for name, path in models.items():
        action = "classify" if isinstance(read_artifact(path)[0], ClassifierArtifact) else "detect"
        posts[name] = Post(f"http://127.0.0.1:{port}/v2/models/{name}/{action}", picture)
    command = [sys.executable, "-m", "serving", "run", str(config)]
    with _started(command, ROOT, dict(os.environ), list(posts.values()), folder / "ours.log") as (pid, cold_start_s):
        yield {name: Running(post, pid, cold_start_s) for name, post in posts.items()}


@contextlib.contextmanager
def peer(name: str, artifact: Path, folder: Path, picture: Path) -> Iterator[Running]:
    """A peer's server of a classifier."""
    said = PEERS[name]
    metadata, _ = read_artifact(artifact)
    assert isinstance(metadata, ClassifierArtifact)
    port = str(free_port())
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "RAY_ADDRESS")}
    preprocess = metadata.preprocess
    environment |= {"MODEL": str(artifact), "PORT": port, "INTERPOLATION": preprocess.interpolation}
    environment |= {"RESIZE": str(preprocess.resize), "CROP": str(preprocess.crop)}
    environment["CORES"] = str(usable_cores())
    environment |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_USAGE_STATS_ENABLED": "0", "BENTOML_DO_NOT_TRACK": "1"}
    bin_folder = install(name) / "bin"
    command = [str(bin_folder / said.command[0]), *(a.replace("$PORT", port) for a in said.command[1:])]
    body, kind = (as_form(picture, folder / "form"), FORM) if said.form else (picture, "image/jpeg")
    post = Post(f"http://127.0.0.1:{port}{said.path}", body, kind)
    with _started(command, HERE, environment, [post], folder / "peer.log") as (pid, cold_start_s):
        yield Running(post, pid, cold_start_s)


def install(name: str) -> Path:
    """The peer's environment, made if it is not there."""
    packages = PEERS[name].package.split()
    folder = CACHE / "".join(c if c.isalnum() else "-" for c in packages[0])
    done = folder / "installed"
    if not done.exists() or done.read_text().split() != packages:
        uv = shutil.which("uv")
        if uv is None:
            raise InputError("uv installs the peers and is not on PATH: pip install uv")
        subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, str(folder)], check=True)
        python = str(folder / "bin" / "python")
        subprocess.run([uv, "pip", "install", "-q", "--python", python, *packages, *COMMON], check=True)
        done.write_text("\n".join(packages))
    return folder


def version(name: str) -> str:
    """Of the peer that is installed, and of the onnxruntime that it runs."""
    package = PEERS[name].package.split()[0].partition("[")[0]
    code = f"from importlib.metadata import version as v; print(v({package!r}), 'on onnxruntime', v('onnxruntime'))"
    said = subprocess.run([install(name) / "bin/python", "-c", code], check=True, capture_output=True, text=True)
    return said.stdout.strip()


def as_form(picture: Path, form: Path) -> Path:
    """A form with the picture as its field `image`."""
    head = (
        '--cspnet\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    )
    form.write_bytes(head.encode() + picture.read_bytes() + b"\r\n--cspnet--\r\n")
    return form


@contextlib.contextmanager
def _started(
    command: list[str], folder: Path, environment: dict[str, str], posts: list[Post], log: Path
) -> Iterator[tuple[int, float]]:
    """A server's process, once it answers all `posts`, and how long that took; at the end none of it is left."""
    began = time.monotonic()
    with open(log, "wb") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
    try:
        while not all(map(_answers, posts)):
            if process.poll() is not None or time.monotonic() - began > START_TIMEOUT_S:
                raise InputError(f"{' '.join(command)} does not serve: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        cold_start_s = time.monotonic() - began
        time.sleep(SETTLE_S)
        yield process.pid, cold_start_s
    finally:
        below = tree(process.pid)
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        for pid in below:
            if pid.alive():
                os.kill(pid.pid, signal.SIGKILL)
        process.wait()


def _answers(post: Post) -> bool:
    request = urllib.request.Request(post.url, post.body.read_bytes(), {"Content-Type": post.content_type})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
