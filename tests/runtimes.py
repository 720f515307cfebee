"""What the tests of running artefacts share."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

NO_OPENVINO = importlib.util.find_spec("openvino") is None
ON_CPU = ("cpu", pytest.param("openvino", marks=pytest.mark.skipif(NO_OPENVINO, reason="no openvino")))


def pixels(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_equal(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, name)
