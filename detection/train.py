"""The work of `python -m detection train`: from COCO annotations to weights, alone or under torchrun, a checkpoint an
epoch.

A run that was killed and resumed ends with the bits of one that was not: on the same machine, with the same version
of torch and the same number of threads and processes, on the CPU. CUDA's kernels do not promise that much.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from backbones.augment import sample_seed
from backbones.board import tensorboard, write_epoch
from backbones.checkpoint import Run, find_checkpoint, pick_device, seed_everything
from backbones.distributed import everywhere, is_main, on_main, process_group, rank, together, world_size
from backbones.errors import InputError
from backbones.files import check_writable, sha256
from backbones.optim import create_optimizer
from backbones.replica import average, average_statistics, replicate
from detection.augment import DetectionAugment
from detection.coco import CocoSet, read_coco
from detection.coco_eval import evaluate as coco_figures
from detection.config import DetectorConfig
from detection.diverged import keep_batch
from detection.engine import Diverged, evaluate, train_one_epoch
from detection.families import Detector
from detection.images import EvaluationImages, TrainingImages, aspect_ratios, create_loader
from detection.models import build_detector, has_masks
from detection.plan import GroupedPlan
from detection.spec import DetectorSpec, canonical_name, spec_of
from detection.weights import fetch_weights, start_from

FIGURES = ("AP", "AP50", "AP75")


def run_train(config: DetectorConfig) -> dict[str, Any]:
    """Train, evaluate after each epoch, and return the best epoch's figures and the history.

    Writes to `config.output`: `last.pt` to resume from, `best.safetensors` by the boxes' AP50, `last.safetensors`,
    `history.json`, `history.csv`, and TensorBoard's log where that is installed. With `train.ema` it is the averaged
    weights that are evaluated and written. A batch whose loss is not finite is kept in `diverged/`.

    Raises:
        InputError: no data, a loss that is not finite, or nothing to resume from.
    """
    canonical_name(config.model)  # a misspelt name is said before the data is read
    with process_group(pick_device(config.device)) as device:
        return _train(config, device)


def _train(config: DetectorConfig, device: torch.device) -> dict[str, Any]:
    train, data = config.train, config.data
    _check(config, device)
    training_set, held_out = _data(config)
    images = TrainingImages(training_set, config.preprocess, _augment(config), masks=has_masks(config.model))
    plan = GroupedPlan(train, aspect_ratios(training_set), data.batch_size, config.seed, data.aspect_ratio_groups)
    seed_everything(config.seed)
    spec = spec_of(config, len(training_set.classes) + 1)
    model = _model(config, spec, training_set, device)
    ema = None if train.ema is None else average(model, train.ema)
    optimizer = create_optimizer(
        model, train.optimizer, plan.lr, train.momentum, train.weight_decay,
        nesterov=train.nesterov, decay_norms=train.decay_norms,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp and device.type == "cuda")
    facts = {"images": len(images), "annotations_sha256": sha256(str(data.train_annotations))}
    facts |= {"norm": spec.norm, "frozen_stages": spec.frozen_stages}  # which hang on the weights it started from
    metadata = _metadata(config, spec, training_set)
    run = Run(config, model, optimizer, scaler, "AP50", metadata, ema=ema, facts=facts)
    if is_main():
        print(f"{spec.model} on {device.type}, norm={spec.norm}\n{plan.describe()}", flush=True)
    replica = replicate(model, device)

    with tensorboard(run.output / "tensorboard", len(run.history) + 1) if is_main() else nullcontext() as log:
        for epoch in range(len(run.history), train.epochs):
            seed_everything(sample_seed(config.seed, epoch, rank()))  # of the proposals that are drawn, resumed or not
            images.augment.epoch = epoch
            lrs = plan.lrs(epoch)
            try:
                figures = train_one_epoch(
                    replica, create_loader(images, plan.batch, data.workers, plan.order(epoch)), optimizer, scaler,
                    lrs, accumulate=train.accumulate, ema=ema, clip_grad_norm=train.clip_grad_norm, amp=config.amp,
                    title=f"epoch {epoch + 1}/{train.epochs}",
                )  # fmt: skip
            except Diverged as stop:
                raise _stop(stop, run.output, images, plan, training_set.classes) from None
            average_statistics(model, ema)
            measured = _evaluate(config, model if ema is None else ema.module, held_out)
            speed = figures.pop("images") / figures.pop("seconds")
            run.finish_epoch(figures | {"lr": lrs[-1]} | measured)
            if is_main():
                _report(run.history[-1], train.epochs, speed)
                write_epoch(log, run.history[-1] | {"images_per_second": speed})
    result = run.result()
    if is_main():
        print(f"best AP50 {result['best']['AP50']:.4f} at epoch {result['best']['epoch']}: {result['weights']}")
    return result


def _check(config: DetectorConfig, device: torch.device) -> None:
    """Say mistakes that cost nothing to find before the data is read, which may take minutes; fetch the weights."""
    spec = spec_of(config, num_classes=2)
    if spec.norm == "sync" and device.type == "cpu":
        raise InputError("norm=sync works on GPUs alone: give norm=batch or norm=group, or device=cuda")
    with torch.device("meta"):
        build_detector(spec, config.preprocess)
    if config.resume:
        find_checkpoint(config)
    else:
        on_main(check_writable, config.output)
        on_main(fetch_weights, config, True)


def _data(config: DetectorConfig) -> tuple[CocoSet, CocoSet]:
    data = config.data
    training_set = read_coco(data.train_images, data.train_annotations, "data.train_", masks=has_masks(config.model))
    held_out = read_coco(data.images, data.annotations, "data.", sized=has_masks(config.model))
    if is_main():
        print(f"training: {training_set}\nheld out: {held_out}")
    if not any(len(record.labels) for record in training_set.records):
        raise InputError(
            f"{data.train_annotations} has no object to learn from: give one that has, or see what is wrong with its "
            "boxes by `python -m detection check-data`"
        )
    held_out.check_categories(training_set.category_ids, training_set.classes, data.train_annotations)
    if only := sorted({*training_set.category_ids} ^ {*held_out.category_ids}):
        raise InputError(
            f"one of {data.train_annotations} and {data.annotations} lacks the categories {only}: list the same in both"
        )
    return training_set, held_out


def _augment(config: DetectorConfig) -> DetectionAugment:
    train = config.train
    return DetectionAugment(
        train.horizontal_flip, train.vertical_flip, train.color_jitter, train.random_crop, seed=config.seed,
        scale_jitter=train.scale_jitter, min_sizes=train.min_sizes, mosaic=train.mosaic,
    )  # fmt: skip


def _model(config: DetectorConfig, spec: DetectorSpec, dataset: CocoSet, device: torch.device) -> Detector:
    """The detector with the weights that training starts from; a resumed run's own come later."""
    sync = device.type == "cuda" and world_size() > 1
    model = build_detector(spec, config.preprocess, None if config.resume else config.weights_backbone, sync)
    if config.weights is not None and not config.resume:
        pretrained = config.weights_backbone is not None
        said = start_from(model, config.weights, dataset.category_ids, dataset.classes, body_loaded=pretrained)
        if is_main():
            print(said)
    return model.to(device)


def _stop(
    stop: Diverged, output: Path, images: TrainingImages, plan: GroupedPlan, classes: Sequence[str]
) -> InputError:
    """Keep the batch whose loss is not finite, of each process where it is so; the error for all to end with."""
    epoch, first = images.augment.epoch, stop.batch * plan.batch
    lr = plan.lrs(epoch)[stop.batch // plan.train.accumulate]
    folders = {process: output / (f"diverged-{process}" if process else "diverged") for process in stop.losses}

    def keep() -> None:
        if rank() in stop.losses:
            mine = stop.losses[rank()].items()
            losses = {name: value if math.isfinite(value) else str(value) for name, value in mine}
            facts = {"epoch": epoch + 1, "batch": stop.batch, "lr": lr, "losses": losses}
            keep_batch(folders[rank()], images, plan.order(epoch)[first : first + plan.batch], classes, facts)

    together(keep)  # whoever left before would have torchrun end the others
    last = output / "last.safetensors"
    go_on = f", or go on from weights={last} into another output" if last.exists() else ""
    return InputError(
        f"{stop}, lr {lr:.3g}: its batch is in {folders[min(folders)]}; "
        f"lower train.lr or lengthen the warm-up and start again{go_on}"
    )


def _evaluate(config: DetectorConfig, model: Detector, held_out: CocoSet) -> dict[str, float]:
    """The held-out images' figures of boxes and, as `mask_AP` and so on, of masks; one process does the sums."""
    share = range(rank(), len(held_out.records), world_size())
    images = EvaluationImages(held_out, config.preprocess)
    loader = create_loader(images, config.data.batch_size, config.data.workers, share)
    results = evaluate(model, loader, held_out.category_ids, amp=config.amp)
    path, masks = str(config.data.annotations), has_masks(model)  # of no detections, too: epochs have the same keys
    found = everywhere(lambda: coco_figures(path, results, config.metric, masks) if is_main() else {})[0]
    boxes = {name: found[name] for name in FIGURES}
    return boxes | {f"mask_{name}": found["segm"][name] for name in FIGURES if "segm" in found}


def _report(entry: dict[str, float], epochs: int, speed: float) -> None:
    figures = ", ".join(f"{name} {value:.4f}" for name, value in entry.items() if name.endswith(("AP", "AP50")))
    print(f"epoch {entry['epoch']}/{epochs}: loss {entry['loss']:.3f}, {figures}, {speed:.1f} images/s", flush=True)


def _metadata(config: DetectorConfig, spec: DetectorSpec, dataset: CocoSet) -> dict[str, Any]:
    include: Any = {
        "model": True, "fpn_channels": True, "norm": True, "frozen_stages": True, "train": True, "seed": True,
        "amp": True, "data": {"batch_size", "aspect_ratio_groups"},
    }  # fmt: skip
    return {
        "task": "detection",
        "model": spec.model,
        "detector": spec.model_dump(),
        "classes": list(dataset.classes),
        "category_ids": list(dataset.category_ids),
        "preprocess": config.preprocess.model_dump(),
        # Without paths: who trained it where is nobody's business.
        "config": config.model_dump(mode="json", include=include) | {"processes": world_size()},
    }
