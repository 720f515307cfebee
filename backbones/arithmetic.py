"""What float32 stands for on a GPU."""

import contextlib
from collections.abc import Iterator

import torch


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
