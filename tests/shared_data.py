"""Where real data lies, for the tests that use it where it exists."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("CSPNET_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real(name: str) -> Path:
    """The folder of a real data set; skips the test where there is none."""
    if not (ROOT / name).is_dir():
        pytest.skip(f"no {ROOT / name}: set CSPNET_TEST_DATA to a folder that has it")
    return ROOT / name
