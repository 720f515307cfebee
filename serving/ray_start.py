"""Start Ray in this process without its chatter; no torch here."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

# Read when Ray is imported and when it starts; a value that is set already wins.
_ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers start in this environment, not in a `uv run` of their own
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray's core calls every pool of restartable actors an error
    "RAY_DATA_LOG_LEVEL": "CRITICAL",  # Ray Data logs each exception that it also raises
}


def start_ray(**kwargs: Any) -> bool:
    """Start Ray, or join the cluster that RAY_ADDRESS names; True if this call did, and so has to shut it down."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return False
    # By itself Ray joins the last one that anybody started on this machine.
    kwargs = {"address": os.environ.get("RAY_ADDRESS") or "local"} | kwargs
    with _silent_stderr():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL, **kwargs)
    return True


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep from the terminal what Ray's core writes past Python, such as the log level it was given."""
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
