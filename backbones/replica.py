"""The copies of a model that training keeps: one in each process, and one averaged over the steps."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from backbones.distributed import world_size

Tensors = tuple[Tensor, ...] | list[Tensor]


def replicate(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, under torchrun with gradients averaged over the processes."""
    if world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def unwrap(model: nn.Module) -> nn.Module:
    """The model in DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def no_sync(model: nn.Module, apart: bool) -> AbstractContextManager[None]:
    """Where `apart`, gradients stay each process's own: more batches of the step are to come."""
    return model.no_sync() if apart and isinstance(model, DistributedDataParallel) else nullcontext()


def average(model: nn.Module, decay: float) -> AveragedModel:
    """A running average of the model's weights and BatchNorm's statistics; its first step copies them. Counts are the
    model's own.
    """
    mix = get_ema_multi_avg_fn(decay)

    def update(averaged: Tensors, current: Tensors, steps: Tensor | int) -> None:
        """Of tensors of one type."""
        if averaged[0].is_floating_point():
            mix(averaged, current, steps)
        else:
            torch._foreach_copy_(averaged, current)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def average_statistics(*models: nn.Module | None) -> None:
    """Make BatchNorm's running statistics the processes' mean, since all evaluate: after a step each has its own, made
    of its last batch and of the main process's before, which DistributedDataParallel hands to all at each step.
    """
    if world_size() == 1:
        return
    for model in filter(None, models):
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
                for statistic in (module.running_mean, module.running_var):
                    dist.all_reduce(statistic)
                    statistic /= world_size()
