"""The machine that benchmarks run on, as Linux and the NVIDIA driver describe it."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from serving.sessions.providers import usable_cores

SIMD = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp")  # what kernels are chosen by


def machine() -> dict[str, Any]:
    """CPU, the cores that this process may use, GiB of memory, GPUs, and Python."""
    fields = dict(_fields(Path("/proc/cpuinfo")))
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "simd": [name for name in SIMD if name in flags],
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _fields(path: Path) -> list[tuple[str, str]]:
    """`name: value` of each line."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [(name.strip(), value.strip()) for name, colon, value in (line.partition(":") for line in lines) if colon]


def _gpus() -> list[str]:
    """Name, memory and driver of each."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True)
    return said.stdout.splitlines() if said.returncode == 0 else []
