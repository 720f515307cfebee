"""Processes and their memory, read from /proc."""

import contextlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process; `begin`, in ticks, tells it from a later one of the same number."""

    pid: int
    begin: int

    def alive(self) -> bool:
        found = _stat(self.pid)
        return found is not None and found[2] == self.begin and found[0] != "Z"

    def command(self) -> str:
        """Its arguments, or what it calls itself; nothing if it has ended."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/cmdline").read_text().replace("\0", " ").strip()
        return ""


def tree(root: int) -> list[Process]:
    """The processes below `root`, and it."""
    stats = {int(p.name): _stat(int(p.name)) for p in Path("/proc").glob("[0-9]*")}
    found = {root}
    while more := {pid for pid, stat in stats.items() if stat and stat[1] in found} - found:
        found |= more
    return [Process(pid, stat[2]) for pid in sorted(found) if (stat := stats.get(pid))]


def memory_mb(root: int) -> float:
    """Of the processes below `root` and of it; a page that several share counts once (PSS)."""
    return sum(pss_mb(process.pid) for process in tree(root))


def pss_mb(pid: int) -> float:
    """Of one process, which has its share of a page that several share; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0) / 1024


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, parent and begin."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[1]), int(fields[19])
