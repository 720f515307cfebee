"""The loops over a detector: one epoch of training, one evaluation. Plain functions that return plain data."""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from backbones.arithmetic import autocast, tensor_float32
from backbones.distributed import collect, gather, is_main, world_size
from backbones.engine import to_device
from backbones.errors import InputError
from backbones.memory import in_parts
from backbones.optim import take_step
from backbones.preprocess import Fitted, canvas_size
from backbones.progress import progress
from backbones.replica import no_sync, unwrap
from detection.coco_eval import to_results
from detection.families import Detector
from detection.images import to_image
from detection.masks import PastedMasks

Losses = dict[str, float]


class Diverged(InputError):
    """The loss is not finite.

    Attributes:
        batch: the number, from 0, of the epoch's first batch of which it is so in any process.
        losses: each loss of that batch, by the ranks of the processes where it is so.
    """

    def __init__(self, message: str, batch: int, losses: dict[int, Losses]):
        super().__init__(message)
        self.batch, self.losses = batch, losses


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Sequence[Tensor], Sequence[dict[str, Tensor]]]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    lrs: Sequence[float],
    *,
    accumulate: int = 1,
    ema: AveragedModel | None = None,
    clip_grad_norm: float | None = None,
    amp: bool = False,
    title: str = "training",
) -> dict[str, float]:
    """One pass over `loader`. Returns the mean of `loss` and of each of its parts over the batches, `images` seen and
    `seconds`, over all processes.

    A step's gradient is the mean of its batches'. A batch's loss is torchvision's: of RetinaNet a mean over images,
    so that the mean of batches is that of one large batch; FCOS and the two-stage detectors divide by what is found
    or drawn in a batch, so that it is nearly that.

    Args:
        model: a detector, or one in DistributedDataParallel.
        loader: batches (images uint8 [h, w, 3], targets), `accumulate` a step, as many in every process.
        lrs: the learning rate of each step.
        ema: averaged after each step.

    Raises:
        Diverged: the loss is not finite in some process; all raise it. On CUDA that is looked at every 20 steps.
    """
    model.train()
    device = next(model.parameters()).device
    look = 1 if device.type == "cpu" else 20  # CUDA must not wait for each step's loss
    totals: dict[str, float] = defaultdict(float)
    unread: list[dict[str, Tensor]] = []  # losses of the batches since the last look
    start, seen = time.monotonic(), 0
    bar = progress(loader, total=len(lrs) * accumulate, desc=title, unit="batch", disable=not is_main())
    for count, (images, targets) in enumerate(bar, start=1):
        step, whole = (count - 1) // accumulate, count % accumulate == 0
        with no_sync(model, apart=not whole):
            with autocast(device, amp):
                losses = model(
                    [to_image(to_device(image, device)) for image in images],
                    [{key: to_device(value, device) for key, value in target.items()} for target in targets],
                )
                loss = sum(losses.values(), torch.zeros((), device=device))
            scaler.scale(loss / accumulate).backward()
        unread.append({name: part.detach().float() for name, part in {"loss": loss, **losses}.items()})
        seen += len(images)
        if not whole:
            continue
        if (step + 1) % look == 0 or step + 1 == len(lrs):
            _stop_if_broken(_read(unread, totals, count), title, accumulate)
            speed = seen * world_size() / (time.monotonic() - start)
            postfix = {"loss": f"{totals['loss'] / count:.3f}", "lr": f"{lrs[step]:.2g}", "images_s": f"{speed:.1f}"}
            bar.set_postfix(postfix, refresh=False)
        take_step(model, optimizer, scaler, lrs[step], clip_grad_norm)
        if ema is not None:
            ema.update_parameters(unwrap(model))
    everyone = gather((dict(totals), seen))
    batches = len(lrs) * accumulate * len(everyone)
    means = {name: sum(mine[name] for mine, _ in everyone) / batches for name in totals}
    return means | {"images": sum(images for _, images in everyone), "seconds": time.monotonic() - start}


def _read(unread: list[dict[str, Tensor]], totals: dict[str, float], count: int) -> tuple[int, Losses] | None:
    """Add up the losses of the last of `count` batches; the first that is not finite, if any, and its number."""
    rows = torch.stack([torch.stack([*losses.values()]) for losses in unread]).tolist()  # CUDA is waited for once
    for batch, row in enumerate(rows, start=count - len(rows)):
        losses = dict(zip(unread[0], row, strict=True))
        if not math.isfinite(losses["loss"]):
            return batch, losses
        for name, value in losses.items():
            totals[name] += value
    unread.clear()
    return None


def _stop_if_broken(mine: tuple[int, Losses] | None, title: str, accumulate: int) -> None:
    """Stop all processes if one has met a loss that is not finite. By its gradient the others meet theirs a step later,
    so that the earliest batch is the one to look into.
    """
    broken = {process: found for process, found in enumerate(gather(mine)) if found is not None}
    if not broken:
        return
    batch = min(number for number, _ in broken.values())
    losses = {process: values for process, (number, values) in broken.items() if number == batch}
    worst = next(iter(losses.values()))
    parts = ", ".join(f"{name} {value:.3g}" for name, value in worst.items() if name != "loss")
    raise Diverged(f"{title}: the loss is {worst['loss']} at step {batch // accumulate} ({parts})", batch, losses)


def evaluate(
    model: Detector,
    loader: DataLoader[Any],
    category_ids: Sequence[int],
    *,
    amp: bool = False,
    title: str = "evaluating",
) -> list[dict[str, Any]]:
    """Detections in COCO's results format, by rising image id; masks are in the image's size. Under torchrun every
    process gives a loader of its share of the images, and the main one gets all detections, the others none; an image
    counts once, whatever shares it is in.

    Raises:
        InputError: an image that cannot be decoded, in whatever process; or memory does not hold a single image.
    """
    of_image: dict[int, list[dict[str, Any]]] = {}
    for part in collect(lambda: _evaluate(model, loader, category_ids, amp, title)):
        of_image |= part
    return [row for image_id in sorted(of_image) for row in of_image[image_id]]


@torch.inference_mode()
@tensor_float32(False)
def _evaluate(
    model: Detector, loader: DataLoader[Any], category_ids: Sequence[int], amp: bool, title: str
) -> dict[int, list[dict[str, Any]]]:
    """The detections of each image of this process's loader. Images of one canvas run together, since a picture's
    detections depend on its canvas; those that do not fit into memory run in halves, as do the batches after them.
    """
    model.eval()
    device = next(model.parameters()).device
    divisor = int(model.transform.size_divisible)

    def forward(images: Any) -> list[dict[str, Tensor]]:
        with autocast(device, amp):
            pixels = [torch.from_numpy(fitted.pixels.copy()) for fitted in images]  # Pillow's arrays are read-only
            outputs = model([to_image(one.to(device)) for one in pixels])
        return [{key: value.cpu() for key, value in output.items()} for output in outputs]

    results: dict[int, list[dict[str, Any]]] = {}
    size: int | None = None
    for image_ids, batch in progress(loader, desc=title, unit="batch", disable=not is_main()):
        canvases: dict[tuple[int, int], list[tuple[int, Fitted]]] = defaultdict(list)
        for image_id, fitted in zip(image_ids, batch, strict=True):
            canvases[canvas_size(fitted.pixels, divisor)].append((image_id, fitted))
        for members in canvases.values():
            fits = size or len(batch)
            parts, size = in_parts(forward, [fitted for _, fitted in members], fits)
            if size < fits:
                print(f"memory does not hold {fits} images at once: going on with {size}", flush=True)
            outputs = (output for part in parts for output in part)
            for (image_id, fitted), output in zip(members, outputs, strict=True):
                results[image_id] = _results(image_id, fitted, output, category_ids)
    return results


def _results(
    image_id: int, fitted: Fitted, output: dict[str, Tensor], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """One image's detections. The background, label 0, is none: one-stage detectors have an unused output for it."""
    output = {key: value[output["labels"] > 0] for key, value in output.items()}
    boxes = fitted.to_original(output["boxes"].float().numpy())
    categories = [category_ids[label - 1] for label in output["labels"].tolist()]
    masks = None
    if "masks" in output:
        masks = list(PastedMasks(output["masks"][:, 0].float().numpy(), boxes, fitted.original))
    return to_results(image_id, boxes, output["scores"].float().numpy(), categories, masks)
