"""Progress bars: live on a terminal, a line now and then in a log; no torch here."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_INTERVAL_S = 15.0


def progress(items: Iterable[Any] | None = None, **settings: Any) -> "tqdm[Any]":
    """`tqdm(items, **settings)`, seldom redrawn where stderr is a file or a pipe."""
    interval = 0.1 if sys.stderr.isatty() else LOG_INTERVAL_S
    return tqdm(items, mininterval=interval, leave=False, dynamic_ncols=True, **settings)
