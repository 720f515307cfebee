"""The optimizers of both packages' training and how their learning rate goes over a run."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from backbones.errors import InputError
from backbones.schema import OptimizerName

FUSED = ("cpu", "cuda")  # devices where one kernel updates everything; on the CPU to the same bits every time


def create_optimizer(
    model: nn.Module,
    name: OptimizerName,
    lr: float,
    momentum: float,
    weight_decay: float,
    *,
    nesterov: bool = True,
    decay_norms: bool = False,
) -> torch.optim.Optimizer:
    """SGD, RMSProp, or AdamW or LAMB with `momentum` as their beta1.

    They update what requires gradients. LAMB is timm's, without its own clipping. RMSProp is timm's after
    TensorFlow 1, with 0.001 within the root, as timm trains by it.

    Args:
        nesterov: the momentum of SGD.
        decay_norms: decay biases and normalisation layers' parameters too.

    Raises:
        InputError: LAMB or RMSProp without timm.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": weight_decay if decay_norms else 0.0},
    ]
    fused = all(parameter.device.type in FUSED for parameter in parameters)
    if name in ("lamb", "rmsprop"):
        return _timms(name, groups, lr, momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=fused)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, fused=fused)


def _timms(name: str, groups: list[dict[str, object]], lr: float, momentum: float) -> torch.optim.Optimizer:
    try:
        from timm.optim.lamb import Lamb
        from timm.optim.rmsprop_tf import RMSpropTF
    except ImportError:
        raise InputError(f"train.optimizer={name} needs timm: pip install 'cspnet[timm]'") from None
    if name == "rmsprop":
        return RMSpropTF(groups, lr=lr, momentum=momentum, eps=0.001)
    return Lamb(groups, lr=lr, betas=(momentum, 0.999), max_grad_norm=None)


def take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, lr: float, clip: float | None
) -> None:
    """One step by the model's gradients, first clipped to the norm `clip` if one is given; they are gone after it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if clip is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the full learning rate at a step: a linear rise, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * _progress(step, steps, warmup)))


def warmup_poly(step: int, steps: int, warmup: int, power: float) -> float:
    """Share of the full learning rate at a step: a linear rise, then (1 - t)^power down to 0.

    Darknet's `policy=poly` counts t from the first step and rises with the fourth power; over its 1000 steps
    of 800 000 that is no difference to speak of.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 - _progress(step, steps, warmup)) ** power


def warmup_step(step: int, warmup: int, every: int, rate: float) -> float:
    """Share of the full learning rate at a step: a linear rise, then `rate` to the power of how many times `every`
    steps are over, counted from the first step as timm counts.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return rate ** (step // max(1, every))


def warmup_multistep(step: int, warmup: int, milestones: Sequence[int], rate: float) -> float:
    """Share of the full learning rate at a step: a linear rise, times `rate` for each milestone that is over, counted
    from the first step.
    """
    rise = (step + 1) / (warmup + 1) if step < warmup else 1.0
    return rise * rate ** sum(step >= milestone for milestone in milestones)


def _progress(step: int, steps: int, warmup: int) -> float:
    return (step - warmup) / max(1, steps - warmup)
