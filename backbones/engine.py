"""The loops over a classifier: one epoch of training, one evaluation. Plain functions that return a dict."""

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from backbones.arithmetic import autocast, tensor_float32
from backbones.distributed import everywhere, gather, is_main, rank, world_size
from backbones.errors import InputError
from backbones.imagenet import ImageNet, create_loader
from backbones.memory import in_parts
from backbones.metrics import Accuracy
from backbones.metrics import rank as rank_classes
from backbones.optim import take_step
from backbones.preprocess import ClassifierPreprocess
from backbones.progress import progress
from backbones.replica import no_sync, unwrap


def normalize(pixels: Tensor, preprocess: ClassifierPreprocess) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], as torchvision's `ToTensor` and `Normalize`."""
    if pixels.device.type == "cpu":  # costs nothing, and an export traces it: a cache would keep the trace's tensors
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    else:
        mean, std = _constants(preprocess, pixels.device)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@functools.cache
def _constants(preprocess: ClassifierPreprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation on a device, once: to copy them to a GPU is to wait for all that it has still to do."""
    with torch.inference_mode(False):  # whoever comes first, training may use them too
        return torch.tensor(preprocess.mean, device=device), torch.tensor(preprocess.std, device=device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that on CUDA is not waited for; elsewhere torch gives no order of such a copy and what is computed."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    targets: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    preprocess: ClassifierPreprocess,
    lrs: Sequence[float],
    *,
    accumulate: int = 1,
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ema: AveragedModel | None = None,
    label_smoothing: float = 0.0,
    clip_grad_norm: float | None = None,
    amp: bool = False,
    channels_last: bool = False,
    title: str = "training",
) -> dict[str, float]:
    """One pass over `loader`. Returns the mean loss, the accuracy unless images are mixed, `images` seen, `seconds`,
    over all processes.

    A step's gradient is that of its batches as one large batch, but for BatchNorm, whose statistics are a batch's.

    Args:
        model: a classifier, or one in DistributedDataParallel.
        loader: batches (uint8 [n, H, W, 3], indices int64 [n]), `accumulate` a step, as many in every process.
        targets: int64 [len(dataset)], the classes of the images that the indices count.
        lrs: the learning rate of each step.
        mix: (float [n, 3, H, W], int64 [n]) -> images alike and soft targets [n, C].
        ema: averaged after each step.

    Raises:
        InputError: the loss is not finite, or there is a batch without two images that could be decoded.
    """
    model.train()
    device = next(model.parameters()).device
    look = 1 if device.type == "cpu" else 20  # steps between looks at the loss: CUDA must not wait for each
    totals = torch.zeros(3, device=device)  # sum of losses, right answers, images
    start = time.monotonic()
    bar = progress(loader, total=len(lrs) * accumulate, desc=title, unit="batch", disable=not is_main())
    for count, (pixels, indices) in enumerate(bar, start=1):
        if len(pixels) < 2:
            raise InputError(f"{title}: {len(pixels)} images of a batch could be decoded: repair the data set")
        step, whole = (count - 1) // accumulate, count % accumulate == 0
        labels = to_device(targets[indices], device)
        images = normalize(to_device(pixels, device), preprocess)
        images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        mixed, wanted = mix(images, labels) if mix else (images, labels)
        with no_sync(model, apart=not whole):
            with autocast(device, amp):
                logits = model(mixed)
                loss = F.cross_entropy(logits, wanted, label_smoothing=label_smoothing)
            scaler.scale(loss / accumulate).backward()
        right = (logits.argmax(1) == labels).sum()
        totals += torch.stack([loss.detach() * len(labels), right, torch.full_like(right, len(labels))])
        if not whole:
            continue
        if (step + 1) % look == 0 or step + 1 == len(lrs):
            _show(bar, totals, lrs[step], start, f"{title}: the loss is {{}} at step {step}")
        take_step(model, optimizer, scaler, lrs[step], clip_grad_norm)
        if ema is not None:
            ema.update_parameters(unwrap(model))
    loss_sum, hits, seen = (sum(column) for column in zip(*gather(totals.tolist()), strict=True))
    accuracy = {} if mix else {"train_top1": hits / seen}
    return {"loss": loss_sum / seen, **accuracy, "images": seen, "seconds": time.monotonic() - start}


def _show(bar: Any, totals: Tensor, lr: float, start: float, broken: str) -> None:
    """All processes' figures so far on the progress bar; where they are not finite, all stop."""
    loss_sum, _, seen = (sum(column) for column in zip(*gather(totals.tolist()), strict=True))
    if not math.isfinite(loss_sum):
        raise InputError(broken.format(loss_sum) + ": lower train.lr or lengthen the warm-up")
    speed = seen / (time.monotonic() - start)
    bar.set_postfix(loss=f"{loss_sum / seen:.3f}", lr=f"{lr:.2g}", images_s=f"{speed:.0f}", refresh=False)


@dataclass(frozen=True)
class Predictions:
    """What a network says of a data set's images; those that could not be decoded and were skipped are missing.

    Attributes:
        indices: int64 [M], positions in the data set, rising.
        logits: float32 [M, C].
        batch_size: how many images at once memory held.
    """

    indices: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    batch_size: int


def predict(
    model: nn.Module,
    dataset: ImageNet,
    *,
    batch_size: int,
    workers: int,
    amp: bool = False,
    channels_last: bool = False,
    title: str = "evaluating",
) -> Predictions:
    """Logits of every image, each computed once; under torchrun every process takes its share and gets the whole.

    A batch that does not fit into memory is run in halves, as are those after it.

    Raises:
        InputError: an image that cannot be decoded where errors stop the run, in whatever process; no image at all;
            or memory does not hold a single image.
    """
    share = range(rank(), len(dataset), world_size())
    found = everywhere(
        lambda: _predict(model, dataset, share, batch_size, workers, amp=amp, channels_last=channels_last, title=title)
    )
    indices = np.concatenate([part.indices for part in found])
    if not len(indices):
        raise InputError(f"none of the {len(dataset)} images can be decoded: is this the right data set?")
    order = np.argsort(indices)
    logits = np.concatenate([part.logits for part in found if len(part.indices)])
    return Predictions(indices[order], logits[order], min(part.batch_size for part in found))


@torch.inference_mode()
@tensor_float32(False)
def _predict(
    model: nn.Module,
    dataset: ImageNet,
    share: Sequence[int],
    batch_size: int,
    workers: int,
    *,
    amp: bool,
    channels_last: bool,
    title: str,
) -> Predictions:
    model.eval()
    device = next(model.parameters()).device
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def forward(pixels: Tensor) -> Tensor:
        images = normalize(to_device(pixels, device), dataset.preprocess).contiguous(memory_format=layout)
        with autocast(device, amp):
            logits = model(images)
        # On CUDA into pinned memory, without waiting: the next batch starts while this one runs.
        return logits.float().to("cpu", non_blocking=device.type == "cuda")

    indices, logits = [torch.empty(0, dtype=torch.int64)], []
    loader = create_loader(dataset, batch_size, workers, share)
    for pixels, positions in progress(loader, desc=title, unit="batch", disable=not is_main()):
        fits = batch_size
        parts, batch_size = in_parts(forward, pixels, batch_size)
        if batch_size < fits:
            print(f"memory does not hold {fits} images at once: going on with {batch_size}", flush=True)
        logits += parts
        indices.append(positions)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    joined = torch.cat(logits) if logits else torch.empty(0, 0)
    return Predictions(torch.cat(indices).numpy(), joined.numpy(), batch_size)


def evaluate(
    model: nn.Module,
    dataset: ImageNet,
    classes: Sequence[str],
    *,
    batch_size: int,
    workers: int,
    amp: bool = False,
    channels_last: bool = False,
    title: str = "evaluating",
) -> dict[str, Any]:
    """Top-1 and top-5, overall and per class, as `metrics.Accuracy` gives them, and how many images were skipped.

    Raises:
        InputError: as `predict`, or logits that are not finite.
    """
    predictions = predict(
        model, dataset, batch_size=batch_size, workers=workers, amp=amp, channels_last=channels_last, title=title
    )
    accuracy = Accuracy(classes)
    accuracy.update(rank_classes(predictions.logits, 5), dataset.targets.numpy()[predictions.indices])
    return accuracy.compute() | {"skipped": len(dataset) - len(predictions.indices)}
