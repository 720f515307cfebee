"""The loops over a detector: one epoch of training, one evaluation. Plain functions that return plain data."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from backbones.engine import to_device
from backbones.errors import InputError
from backbones.preprocess import Fitted, canvas_size
from backbones.progress import progress
from detection.coco import to_image
from detection.coco_eval import to_results
from detection.models import Detector


def train_one_epoch(
    model: Detector,
    loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    lrs: Sequence[float],
    *,
    clip_grad_norm: float,
    amp: bool,
    title: str,
) -> dict[str, float]:
    """One pass over `loader`; `lrs` has the learning rate of each step. Returns each loss's mean.

    Raises:
        InputError: the loss is not finite.
    """
    model.train()
    device = next(model.parameters()).device
    sums: dict[str, float] = defaultdict(float)
    bar = progress(loader, desc=title, unit="batch")
    for step, (images, targets) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = lrs[step]
        with torch.autocast(device.type, torch.bfloat16 if device.type == "cpu" else None, enabled=amp):
            losses = model(
                [to_device(image, device) for image in images],
                [{key: to_device(value, device) for key, value in target.items()} for target in targets],
            )
            loss = sum(losses.values(), torch.zeros((), device=device))
        value = loss.item()
        if not math.isfinite(value):
            parts = ", ".join(f"{name} {part.item():.3g}" for name, part in losses.items())
            raise InputError(f"{title}: the loss is {value} at step {step} ({parts}): lower train.lr")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        for name, part in {"loss": loss, **losses}.items():
            sums[name] += part.item()
        bar.set_postfix(loss=f"{sums['loss'] / (step + 1):.3f}", refresh=False)
    return {name: total / len(loader) for name, total in sums.items()}


@torch.inference_mode()
def evaluate(
    model: Detector, loader: DataLoader[Any], category_ids: Sequence[int], title: str = "evaluating"
) -> list[dict[str, Any]]:
    """Detections of every image in COCO's results format. Images of one canvas run together, since a picture's
    detections depend on its canvas.
    """
    model.eval()
    device = next(model.parameters()).device
    divisor = int(model.transform.size_divisible)
    results = []
    for image_ids, batch in progress(loader, desc=title, unit="batch"):
        canvases: dict[tuple[int, int], list[tuple[int, Fitted]]] = defaultdict(list)
        for image_id, fitted in zip(image_ids, batch, strict=True):
            canvases[canvas_size(fitted.pixels, divisor)].append((image_id, fitted))
        for members in canvases.values():
            outputs = model([to_image(fitted.pixels).to(device) for _, fitted in members])
            for (image_id, fitted), output in zip(members, outputs, strict=True):
                # The background, label 0, is no detection: one-stage detectors have an unused output for it.
                output = {key: value[output["labels"] > 0].cpu() for key, value in output.items()}
                boxes = fitted.to_original(output["boxes"].float().numpy())
                categories = [category_ids[label - 1] for label in output["labels"].tolist()]
                results += to_results(image_id, boxes, output["scores"].float().numpy(), categories)
    return results
