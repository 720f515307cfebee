"""Applications onto Ray Serve, and new ones in place of those that run, without a request that fails; no torch here."""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from backbones.errors import InputError
from serving.config import ServingConfig

if TYPE_CHECKING:
    from serving.service.applications import ServedApplication

POLL_S = 0.1
FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


def deploy(applications: Sequence["ServedApplication"], timeout_s: float, began: float | None = None) -> None:
    """Start applications, or roll new replicas in where one of the name runs, and return once all run.

    Args:
        timeout_s: counted from `began`, of `time.monotonic`, or from now.

    Raises:
        InputError: one does not start. Where one of its name ran, that one's replicas go on.
    """
    from ray import serve

    if not applications:
        return
    deadline = (began or time.monotonic()) + timeout_s
    targets = [
        serve.RunTarget(target=a.application, name=a.name, route_prefix=a.prefix, logging_config=quiet())
        for a in applications
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    _wait_until_running([application.name for application in applications], deadline, timeout_s)


def quiet() -> Any:
    """How little Ray Serve is to log."""
    from ray.serve.schema import LoggingConfig

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def check_unchanged(old: ServingConfig, new: ServingConfig) -> None:
    """What is set once, as the service starts.

    Raises:
        InputError: naming what was changed.
    """
    for name in ("host", "port", "grpc_port", "api_keys", "rate_limit", "access_log"):
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            raise InputError(f"{name} is {now} and was {was}: it changes with a restart alone")
    if new.grpc_port is not None and new.max_body_bytes > old.max_body_bytes:
        raise InputError(
            f"max_body_bytes is {new.max_body_bytes} and was {old.max_body_bytes}: with grpc_port it rises with a "
            "restart alone"
        )
    if new.request_timeout_s > old.request_timeout_s:
        raise InputError(
            f"a timeout_s of {new.request_timeout_s - 1:g} is above the largest that the service began with, "
            f"{old.request_timeout_s - 1:g}: it rises with a restart alone"
        )


def roll_out(old: Sequence["ServedApplication"], new: Sequence["ServedApplication"], timeout_s: float) -> None:
    """Put new applications in place of old ones, which answer until the new ones do.

    Those that are added come first: whoever is handed a request is there. The caller deletes those that are gone.

    Raises:
        InputError: a model's task would change, or a replica does not start; the old ones are back, as they are after
            any other error.
    """
    before = {application.name: application for application in old}
    _check_tasks(before, new)
    changed = [a for a in new if a.name not in before or before[a.name].settings != a.settings]
    added = [application for application in changed if application.name not in before]
    begun: list[ServedApplication] = []
    try:
        for stage in (added, [application for application in changed if application.name in before]):
            begun += stage
            deploy(stage, timeout_s)
    except Exception as error:
        _put_back(begun, before, timeout_s, error)
        raise


def _put_back(
    begun: Sequence["ServedApplication"],
    before: Mapping[str, "ServedApplication"],
    timeout_s: float,
    reason: Exception,
) -> None:
    """Ray keeps old replicas when new ones fail, but would start no others in their place."""
    try:
        deploy([before[application.name] for application in begun if application.name in before], timeout_s)
    except InputError as error:
        raise InputError(f"{reason}; and what ran before is not back in full: {error}") from None
    finally:
        delete([application.name for application in begun if application.name not in before])


def delete(names: Sequence[str]) -> None:
    """End applications, once their requests are answered."""
    from ray import serve

    for name in names:
        serve.delete(name)


def _check_tasks(before: Mapping[str, "ServedApplication"], new: Sequence["ServedApplication"]) -> None:
    tasks = {a.entry.name: a.entry.task for a in before.values() if a.entry is not None}
    for entry in (application.entry for application in new):
        if entry is not None and entry.task != tasks.get(entry.name, entry.task):
            raise InputError(
                f"model {entry.name!r}: the new artefact is for {entry.task}, and the model is for "
                f"{tasks[entry.name]}: serve it under another name"
            )


def _wait_until_running(names: Sequence[str], deadline: float, timeout_s: float) -> None:
    from ray import serve

    while True:
        applications = serve.status().applications
        waiting = [name for name in names if name not in applications]
        for name, application in applications.items():
            if name not in names or application.status == "RUNNING":
                continue
            waiting.append(name)
            if application.status in FAILED:
                messages = [application.message, *(d.message for d in application.deployments.values())]
                raise InputError(f"model {name!r} does not start: {reason(messages)}")
        if not waiting:
            return
        if time.monotonic() > deadline:
            raise too_slow(waiting, timeout_s)
        time.sleep(POLL_S)


def reason(messages: Sequence[str]) -> str:
    """The line of Ray's report that says why: ours if a replica raised one, else the traceback's last."""
    text = "\n".join(messages).replace("\\n", "\n")
    ours = re.findall(r"InputError: (.+)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ours[-1] if ours else lines[-1] if lines else "Ray says no more; its logs are in /tmp/ray"


def too_slow(waiting: Sequence[str], timeout_s: float) -> InputError:
    names = ", ".join(waiting)
    return InputError(f"{names} not ready within {timeout_s:g} s: raise start_timeout_s, or see /tmp/ray")
