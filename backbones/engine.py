"""The loops over a classifier: one epoch of training, one evaluation. Plain functions that return a dict."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from backbones.cspnet import CSPNet
from backbones.errors import InputError
from backbones.metrics import Accuracy, rank
from backbones.preprocess import ClassifierPreprocess
from backbones.progress import progress

Loader = DataLoader[tuple[Tensor, Tensor]]


def normalize(pixels: Tensor, preprocess: ClassifierPreprocess) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], as torchvision's `ToTensor` and `Normalize`."""
    mean = torch.tensor(preprocess.mean, device=pixels.device)
    std = torch.tensor(preprocess.std, device=pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the full learning rate at a step: a linear rise, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_one_epoch(
    model: CSPNet,
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    preprocess: ClassifierPreprocess,
    lrs: Sequence[float],
    *,
    label_smoothing: float,
    amp: bool,
    title: str,
) -> dict[str, float]:
    """One pass over `loader`; `lrs` has the learning rate of each step. Returns mean loss and accuracy.

    Raises:
        InputError: the loss is not finite.
    """
    model.train()
    device = next(model.parameters()).device
    total = right = seen = 0.0
    bar = progress(loader, desc=title, unit="batch")
    for step, (pixels, targets) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = lrs[step]
        targets = targets.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16 if device.type == "cpu" else None, enabled=amp):
            logits = model(normalize(pixels.to(device, non_blocking=True), preprocess))
            loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(f"{title}: the loss is {value} at step {step}: lower train.lr or lengthen the warm-up")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        total += value * len(targets)
        right += (logits.argmax(1) == targets).sum().item()
        seen += len(targets)
        bar.set_postfix(loss=f"{total / seen:.3f}", refresh=False)
    return {"loss": total / seen, "train_top1": right / seen}


@torch.inference_mode()
def evaluate(
    model: CSPNet, loader: Loader, preprocess: ClassifierPreprocess, classes: Sequence[str], title: str = "evaluating"
) -> dict[str, Any]:
    """Top-1 and top-5, overall and per class, as `metrics.Accuracy` gives them."""
    model.eval()
    device = next(model.parameters()).device
    accuracy = Accuracy(classes)
    for pixels, targets in progress(loader, desc=title, unit="batch"):
        logits = model(normalize(pixels.to(device, non_blocking=True), preprocess))
        accuracy.update(rank(logits.float().cpu().numpy(), 5), targets.numpy())
    return accuracy.compute()
