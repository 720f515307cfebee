"""A training that is killed from within, in a process of its own."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPT = """
import os, signal, sys
from {package} import engine
from {package}.__main__ import main

steps, take_step = [], engine.take_step

def kill(*args):
    steps.append(1)
    if len(steps) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    take_step(*args)

engine.take_step = kill
main(sys.argv[1:])
"""


def train_until_killed(package: str, step: int, config: Path, overrides: Sequence[str]) -> None:
    """`python -m <package> train`, ended by SIGKILL before its step of this number, from 1, is taken."""
    script = SCRIPT.format(package=package, step=step)
    command = [sys.executable, "-c", script, "train", str(config), *overrides]
    killed = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
