"""What float32 stands for on a GPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """TensorFloat-32 for matrices and convolutions, or not; PyTorch's convolutions take it unasked, with 10 bits of
    mantissa where float32 has 23. Evaluation does without, so that a checkpoint's figures are those of its artefact.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
