"""Start Ray in this process without its chatter; no torch here."""

import logging
import os
from typing import Any

# Read when Ray is imported and when it starts; a value that is set already wins.
_ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # workers start in this environment, not in a `uv run` of their own
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",  # Ray Data logs each exception that it also raises
}


def start_ray(**kwargs: Any) -> bool:
    """Start Ray, or join the cluster that RAY_ADDRESS names; True if this call did, and so has to shut it down."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return False
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL, **kwargs)
    return True
