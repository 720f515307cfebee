"""What to do when a batch does not fit into memory."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from backbones.errors import InputError

# CUDA's own error has a class; its libraries', the CPU's allocators and other devices have a message.
MESSAGES = (
    "DefaultCPUAllocator",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine",  # cuDNN, where no kernel's workspace fits
)


T = TypeVar("T")


def in_parts(forward: Callable[[Any], T], batch: Tensor | Sequence[Any], size: int) -> tuple[list[T], int]:
    """`forward` of a batch in parts of `size` rows, or of half as many, again and again, until memory holds them.

    Returns what `forward` gave, in order, and the size that fitted.

    Raises:
        InputError: memory does not hold a single row.
    """
    parts: list[T] = []
    start = 0
    while start < len(batch):
        part = batch[start : start + size]
        try:
            parts.append(forward(part))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        else:
            start += len(part)
            continue
        # Out of the handler: the error keeps alive what is to be freed.
        if len(part) == 1:
            raise InputError(
                f"memory does not hold one image ({reason}): give device=cpu, amp=true or smaller images (preprocess)"
            )
        size = len(part) // 2
        torch.cuda.empty_cache()
    return parts, size


def out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in MESSAGES)
