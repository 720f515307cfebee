"""What the command lines share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backbones.cli import SPINS

CODE = """
import argparse, os, sys
from backbones.cli import run_command

assert "torch" not in sys.modules
parser = argparse.ArgumentParser()
parser.set_defaults(run=lambda _: print(os.environ["GOMP_SPINCOUNT"]))
run_command(parser, [])
"""


@pytest.mark.parametrize(("given", "found"), [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_that_wait_spin_little_unless_the_user_says_otherwise(given: dict[str, str], found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
    root = Path(__file__).parents[1]
    said = subprocess.run([sys.executable, "-c", CODE], env=environment, cwd=root, capture_output=True, check=True)
    assert said.stdout.decode().strip() == found
