"""Ray and Ray Serve for a service: started and ended on this machine, or those of a cluster; no torch here."""

import contextlib
import io
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from backbones.errors import InputError
from serving.config import ServingConfig
from serving.ray_start import start_ray
from serving.service.grpc_service import grpc_options

if TYPE_CHECKING:
    from serving.service.applications import ServedApplication

ROOM = 2  # times the CPUs that a config's replicas reserve: new ones start beside the old
STOP_TIMEOUT_S = 4.0  # of Serve, without HAProxy; what is left then, Ray's end kills
DELETE_TIMEOUT_S = 60.0  # of a cluster's applications; what deletes them would join the cluster again after Ray's end


def start(config: ServingConfig, local: bool, grpc_port: int | None) -> None:
    """Start Ray, here or as a cluster's driver, and Ray Serve on it.

    Args:
        grpc_port: Ray's own.

    Raises:
        InputError: one of them does not start, or there are too few GPUs here.
    """
    with _own_sigterm():
        _start_ray(config, local)
    _start_serve(config, grpc_port)


def _start_ray(config: ServingConfig, local: bool) -> None:
    if not local:
        start_ray()
        return
    # What replicas reserve is a count, not cores: two models fit on a machine with one core, and a job in
    # this process beside them.
    reserved = sum(math.ceil(model.num_cpus) * model.max_replicas * len(model.served) for model in config.models)
    try:
        start_ray(address="local", num_cpus=(os.cpu_count() or 1) + ROOM * reserved)
    except Exception as error:  # Ray raises no class of its own when its node does not come up in time
        raise InputError(
            f"Ray did not start ({str(error).splitlines()[0]}): is the machine overloaded? try again"
        ) from error
    check_gpus(config)


def check_gpus(config: ServingConfig) -> None:
    """Of this machine, which gets no more of them; a cluster may.

    Raises:
        InputError: there are too few.
    """
    import ray

    wanted = sum(model.num_gpus * model.max_replicas * len(model.served) for model in config.models)
    found = ray.cluster_resources().get("GPU", 0)
    if wanted > found:
        raise InputError(f"the models ask for {wanted:g} GPUs and Ray finds {found:g}: lower num_gpus or replicas")


def _start_serve(config: ServingConfig, grpc_port: int | None) -> None:
    from ray import serve
    from ray.exceptions import RayError

    from serving.service.rollout import quiet

    options = {"host": config.host, "port": config.port, "request_timeout_s": config.request_timeout_s}
    grpc = None if grpc_port is None else grpc_options(grpc_port, config.request_timeout_s)
    try:
        serve.start(http_options=options, grpc_options=grpc, logging_config=quiet())
    except (RayError, TimeoutError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"Ray Serve did not start ({reason}): is the machine overloaded? try again") from None


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep our handler, if there is one: with Ray's, this process would end and its others stay."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def stop(applications: Sequence["ServedApplication"] | None, drained: bool) -> None:
    """Leave Ray, and on this machine end it; on a cluster delete these applications first.

    Args:
        drained: what was accepted is answered, or has had its time; Serve need not end before Ray does.
    """
    import ray

    if ray.is_initialized():
        if not drained:
            _end_serve(applications)
        ray.shutdown()


def _end_serve(applications: Sequence["ServedApplication"] | None) -> None:
    from ray import serve
    from ray.exceptions import RayError

    def end() -> None:
        with contextlib.suppress(RayError, SystemExit):  # a controller that never came up; or Ray, shut down meanwhile
            if applications is None:
                serve.shutdown()
            for application in applications or ():
                serve.delete(application.name)

    with contextlib.redirect_stdout(io.StringIO()):  # Ray says that its controller died; so it should
        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        thread.join(STOP_TIMEOUT_S if applications is None else DELETE_TIMEOUT_S)
