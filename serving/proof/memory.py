"""The memory that this process takes, and its children, Ray's workers among them; no torch here."""

import os
import resource
import sys
import threading
from pathlib import Path

POLL_S = 0.25


class PeakMemory:
    """Within its `with` block, the largest resident size that one of this process's descendants has reached.

    Attributes:
        bytes: None where there is no /proc.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        known: set[int] = set()
        while True:
            ended = self._ended.is_set()
            found = set(_descendants(os.getpid()))
            for pid in found & known:  # one that is new may be between vfork and exec, with its parent's memory
                peak = _peak(pid)
                if peak is not None:
                    self.bytes = max(self.bytes or 0, peak)
            if ended:
                return
            known = found
            self._ended.wait(POLL_S)


def own_peak() -> int:
    """The largest resident size, in bytes, that this process has reached."""
    peak = _peak(os.getpid())  # on Linux the usage has the parent's in it, whose memory a new process begins with
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak is None else peak


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()  # the name before it may hold anything
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found, waiting = [], [root]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _peak(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    values = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return next((1024 * int(value) for value in values), None)
