"""A service on this machine, or on the Ray cluster that RAY_ADDRESS names; no torch here."""

import contextlib
import os
import queue
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from backbones.errors import InputError
from serving.client import Client
from serving.config import ServingConfig, refuse_files
from serving.ingress.access_log import check_log
from serving.ingress.grpc import write_frontend
from serving.ingress.keys import read_keys
from serving.ingress.listener import PROGRAM, Ingress
from serving.service import cluster, environment

if TYPE_CHECKING:
    from serving.service.applications import ServedApplication

POLL_S = 0.1
DRAIN_TIMEOUT_S = 5.0  # for what was accepted before a stop


class RunningService:
    """A service that answers at `url` until `stop()`, or until its `with` block ends; gRPC at `grpc_url`, if at all."""

    grpc_url: str | None = None

    def __init__(
        self, url: str, config: ServingConfig, applications: list["ServedApplication"], undo: contextlib.ExitStack
    ):
        self.url, self._began_with, self._applications, self._undo = url, config, applications, undo

    def update(self, config: ServingConfig) -> None:
        """Serve another config's models in place of those that run, without a request that fails.

        Raises:
            InputError: an artefact or a value that cannot be served, or replicas that do not start; what ran before
                goes on.
        """
        from serving.service.applications import build
        from serving.service.rollout import check_unchanged, delete, roll_out

        began = self._began_with
        grpc_port = began.grpc_port if config.grpc_port == 0 else config.grpc_port
        config = _resolved(config, config.port or began.port, grpc_port)
        check_unchanged(began, config)
        if "RAY_ADDRESS" not in os.environ:
            cluster.check_gpus(config)
        applications = build(config)
        roll_out(self._applications, applications, config.start_timeout_s)
        gone = {a.name for a in self._applications} - {a.name for a in applications}
        self._applications[:] = applications  # in place: `stop` has the list
        delete(sorted(gone))

    def stop(self) -> None:
        """End every process of the service, or on a cluster delete its applications; harmless when repeated."""
        self._undo.close()

    def __enter__(self) -> "RunningService":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run(load: Callable[[], ServingConfig]) -> None:
    """Serve until Ctrl-C or SIGTERM; SIGHUP loads the config again and rolls it out.

    Raises:
        InputError: as `start` does.
        KeyboardInterrupt: stopped before it was ready.
    """
    _on_signals(_interrupt)  # SIGINT as well: a shell script's background job starts with it ignored
    hangups: queue.SimpleQueue[int] = queue.SimpleQueue()
    signal.signal(signal.SIGHUP, lambda number, _: hangups.put(number))
    service = start(load())
    try:
        while hangups.get():
            _update(service, load)
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        _on_signals(signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
        service.stop()


def _update(service: RunningService, load: Callable[[], ServingConfig]) -> None:
    began = time.monotonic()
    print("loading the config again", flush=True)
    try:
        service.update(load())
    except InputError as error:
        print(f"not rolled out, what ran before goes on: {error}", flush=True)
    except Exception as error:  # a defect, or Ray's: no reason to stop what answers
        traceback.print_exc()
        print(f"the roll-out failed: {type(error).__name__}, see above; the service goes on", flush=True)
    else:
        print(f"rolled out after {time.monotonic() - began:.0f} s", flush=True)


def _on_signals(handler: Callable[..., object] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def start(config: ServingConfig, say: Callable[[str], object] | None = None) -> RunningService:
    """Start a service and return once it answers for every model.

    Args:
        say: takes a line to show; None prints it.

    Raises:
        InputError: an artefact that is missing or broken, a busy port, GPUs that are not there, or models
            that are not ready within `start_timeout_s`; nothing is left running.
    """
    say = say or (lambda line: print(line, flush=True))
    began = time.monotonic()
    local = "RAY_ADDRESS" not in os.environ
    if not local:
        refuse_files(config)
    # Here, since a process of Ray's would not tell of a mistake in the file.
    key = next(iter(read_keys(config.api_keys))) if config.api_keys else None
    if config.access_log:
        check_log(config.access_log)
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(environment.listen(config.host, config.port))
        grpc_port = ray_grpc_port = config.grpc_port  # Ray's own, unless ours is in front of it
        if grpc_port is not None:
            grpc_port = ray_grpc_port = environment.free_port(config.host, grpc_port, "grpc_port")
        config = _resolved(config, listener.getsockname()[1], grpc_port)
        binary = environment.find_haproxy() if local else None
        frontends = []
        if local:
            scratch = Path(tempfile.mkdtemp(prefix="cspnet-"))
            undo.callback(shutil.rmtree, scratch, ignore_errors=True)
            flags: dict[str, str | None] = {**environment.flags(config, scratch, say)}
            if binary is not None:
                flags[environment.BINARY] = str(scratch / PROGRAM)
            undo.callback(environment.change, environment.change(flags))
            if grpc_port is not None and binary is not None:
                ray_grpc_port = environment.free_port(config.host)
                frontends.append(write_frontend(scratch, config.host, grpc_port, ray_grpc_port))
            elif grpc_port is not None:
                say(f"without HAProxy gRPC listens on all of this machine's addresses, not on {config.host} alone")
        # Not before the environment is set, since Ray's constants are read as it is imported.
        import ray

        from serving.service.applications import build
        from serving.service.rollout import deploy

        applications = build(config)
        if ray.is_initialized():
            raise InputError("Ray already runs in this process: stop the other service or job first")
        undo.callback(cluster.stop, None if local else applications, drained=binary is not None)
        if binary is None:
            listener.close()  # Ray's own proxy binds the port
        else:
            undo.callback(Ingress(listener, scratch, binary, frontends).drain, DRAIN_TIMEOUT_S)
        cluster.start(config, local, ray_grpc_port)
        deploy(applications, config.start_timeout_s, began)
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{host}:{config.port}"
        _wait_until_answering(url, key, config, began + config.start_timeout_s)
        say(f"ready after {time.monotonic() - began:.0f} s")
        _introduce(url, key, config, say)
        service = RunningService(url, config, applications, undo.pop_all())
        if config.grpc_port is not None:
            service.grpc_url = f"{host}:{config.grpc_port}"
            say(f"gRPC at {service.grpc_url}")
        return service


def _resolved(config: ServingConfig, port: int, grpc_port: int | None) -> ServingConfig:
    """With the ports that it serves at, and absolute paths."""
    models = tuple(model.resolved() for model in config.models)
    return config.model_copy(update={"models": models, "port": port, "grpc_port": grpc_port})


def _wait_until_answering(url: str, key: str | None, config: ServingConfig, deadline: float) -> None:
    """The ingress learns its routes a moment after the replicas are ready."""
    from serving.service.rollout import too_slow

    paths = ["/v2/health/ready", *(f"/v2/models/{model.name}" for model in config.models)]
    headers = {"X-API-Key": key} if key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=5, trust_env=False) as client:
        while paths:
            try:
                if client.get(paths[0]).status_code == 200:
                    paths.pop(0)
                    continue
            except httpx.TransportError:
                pass
            if time.monotonic() > deadline:
                raise too_slow(paths, config.start_timeout_s)
            time.sleep(POLL_S)


def _metrics_url() -> str:
    """Of the node that this process is on; each has its own."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _introduce(url: str, key: str | None, config: ServingConfig, say: Callable[[str], object]) -> None:
    with Client(url, api_key=key) as client:
        described = {model.name: client.metadata(model.name)["parameters"] for model in config.models}
    for model in config.models:
        about = described[model.name]
        scale = model.autoscaling
        replicas = str(model.replicas) if scale is None else f"{scale.min_replicas} to {scale.max_replicas}"
        say(f"{model.name}: {about['model']}, {about['task']} on {about['provider']}, x{replicas}")
    say(f"serving at {url}; health at {url}/v2/health/ready; metrics for Prometheus at {_metrics_url()}")
    say(f"try: curl --data-binary @image.jpg {url}{about['endpoint']}")
