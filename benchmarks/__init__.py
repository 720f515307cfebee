"""Measurements against the peers, side by side in one run; never part of the tests."""

import os

from backbones.cli import SPINS

os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # as the commands have it, before PyTorch is imported
