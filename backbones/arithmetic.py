"""In which numbers a network computes."""

import contextlib
from collections.abc import Iterator

import torch


def autocast(device: torch.device, enabled: bool) -> torch.autocast:
    """Mixed precision: float16 on a GPU, and bfloat16 on a CPU, which is slow in the other."""
    return torch.autocast(device.type, torch.bfloat16 if device.type == "cpu" else None, enabled=enabled)


@contextlib.contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """TensorFloat-32 for matrices and convolutions, or not; PyTorch's convolutions take it unasked, with 10 bits of
    mantissa where float32 has 23. Evaluation does without, so that a checkpoint's figures are those of its artefact.
    """
    # Not by `fp32_precision`, its successor: who has set that cannot read these any more, as torch.export does.
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions
