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
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = allowed
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
