"""The work of `python -m backbones train`: from images to weights, alone or under torchrun, a checkpoint an epoch.

A run that was killed and resumed ends with the bits of one that was not: on the same machine, with the same version
of torch and the same number of threads and processes, on the CPU. CUDA's kernels do not promise that much.
"""

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from backbones.augment import TrainAugment, sample_seed
from backbones.board import tensorboard, write_epoch
from backbones.checkpoint import Run, find_checkpoint, pick_device, seed_everything
from backbones.config import ClassifierConfig
from backbones.cspnet import CSPNet, create_model, get_variant
from backbones.distributed import is_main, on_main, process_group, rank, world_size
from backbones.engine import evaluate, train_one_epoch
from backbones.errors import InputError
from backbones.evaluate import find_weights
from backbones.files import check_writable
from backbones.imagenet import ImageNet, create_loader
from backbones.mix import Mix
from backbones.optim import create_optimizer
from backbones.plan import Plan
from backbones.replica import average, average_statistics, replicate
from backbones.samples import list_samples
from backbones.weights import read_metadata


def run_train(config: ClassifierConfig) -> dict[str, Any]:
    """Train, evaluate after each epoch, and return the best epoch's figures and the history.

    Writes to `config.output`: `last.pt` to resume from, `best.safetensors` by top-1, `last.safetensors`,
    `history.json`, `history.csv`, and TensorBoard's log where that is installed. With `train.ema` it is the
    averaged weights that are evaluated and written.

    Raises:
        InputError: no data, a loss that is not finite, or nothing to resume from.
    """
    get_variant(config.model)  # a misspelt name is said before the data is read
    with process_group(pick_device(config.device)) as device:
        return _train(config, device)


def _train(config: ClassifierConfig, device: torch.device) -> dict[str, Any]:
    train = config.train
    augment = _augment(config)
    weights = _weights(config)
    if not config.resume:
        on_main(check_writable, config.output)
    training_set, held_out, classes = _data(config, augment, weights)
    plan = Plan(train, len(training_set), config.data.batch_size, config.seed)
    seed_everything(config.seed)
    model = _model(config, None if config.resume else weights, device)
    ema = None if train.ema is None else average(model, train.ema)
    optimizer = create_optimizer(
        model, train.optimizer, plan.lr, train.momentum, train.weight_decay,
        nesterov=train.nesterov, decay_norms=train.decay_norms,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp and device.type == "cuda")
    labels = hashlib.sha256(training_set.targets.numpy().tobytes()).hexdigest()
    facts = {"images": len(training_set), "labels_sha256": labels}
    run = Run(config, model, optimizer, scaler, "top1", _metadata(config, model.name, classes), ema=ema, facts=facts)
    if is_main():
        print(f"{model.name} on {device.type}: {len(training_set)} images to train on, {len(held_out)} held out")
        print(plan.describe(), flush=True)
    torch.backends.cudnn.benchmark = True  # CUDA looks for the fastest kernels: all batches are of one shape
    replica = replicate(model, device)
    mix = Mix(train.mixup, train.cutmix, config.num_classes) if train.mixup or train.cutmix else None
    how: Any = {"amp": config.amp, "channels_last": config.channels_last}

    with tensorboard(run.output / "tensorboard", len(run.history) + 1) if is_main() else nullcontext() as log:
        for epoch in range(len(run.history), train.epochs):
            seed_everything(sample_seed(config.seed, epoch, rank()))  # of mixup and drop-path, resumed or not
            augment.epoch = epoch
            order, lrs = plan.order(epoch), plan.lrs(epoch)
            figures = train_one_epoch(
                replica, create_loader(training_set, plan.batch, config.data.workers, order), training_set.targets,
                optimizer, scaler, config.preprocess, lrs, accumulate=train.accumulate, mix=mix, ema=ema,
                label_smoothing=train.label_smoothing, clip_grad_norm=train.clip_grad_norm,
                title=f"epoch {epoch + 1}/{train.epochs}", **how,
            )  # fmt: skip
            average_statistics(model, ema)
            result = evaluate(
                model if ema is None else ema.module, held_out, classes, batch_size=plan.batch,
                workers=config.data.workers, **how,
            )  # fmt: skip
            speed = figures["images"] / figures.pop("seconds")
            figures["skipped"] = len(order) * world_size() - int(figures.pop("images"))
            measured = {"top1": result["top1"], "top5": result["top5"], "val_skipped": result["skipped"]}
            run.finish_epoch(figures | {"lr": lrs[-1]} | measured)
            if is_main():
                _report(run.history[-1], train.epochs, speed)
                write_epoch(log, run.history[-1] | {"images_per_second": speed})
    result = run.result()
    if is_main():
        print(f"best top-1 {100 * result['best']['top1']:.2f} at epoch {result['best']['epoch']}: {result['weights']}")
    return result


def _weights(config: ClassifierConfig) -> Path | None:
    """The weights that training starts from or, of a resumed run, the ones that it has written: of these no more is
    read than the head's classes, and those that it started from may be gone.
    """
    if not config.resume:
        return find_weights(config)
    written = find_checkpoint(config).with_name("last.safetensors")
    return written if written.exists() else None


def _augment(config: ClassifierConfig) -> TrainAugment:
    train = config.train
    return TrainAugment(
        config.preprocess.crop, seed=config.seed, min_scale=train.min_scale, horizontal_flip=train.horizontal_flip,
        vertical_flip=train.vertical_flip, color_jitter=train.color_jitter, magnitude=train.randaugment,
        random_erasing=train.random_erasing,
    )  # fmt: skip


def _data(
    config: ClassifierConfig, augment: TrainAugment, weights: Path | None
) -> tuple[ImageNet, ImageNet, list[str]]:
    """The training and the held-out images, and the names of the classes: those of the head to start from, if any."""
    data = config.data
    trained_on = read_metadata(weights).get("classes") if weights and not config.ignore_head else None
    samples, classes = list_samples(data, data.train_split, config.num_classes, trained_on)
    known = classes if data.ground_truth else trained_on  # flat images name no classes
    held_out, val_classes = list_samples(data, data.split, config.num_classes, known)
    if data.batch_size == 1:
        raise InputError("data.batch_size=1: BatchNorm cannot train on one image; give at least 2")
    if {sample.name for sample in samples} & {sample.name for sample in held_out}:
        raise InputError(f"{data.root} has no separate {data.split!r} folder to evaluate on: make one")
    if val_classes != classes:
        raise InputError(f"{data.root}: the class folders of the training and validation splits differ")
    settings: Any = {"decoder": data.decoder, "on_error": data.on_error}
    return (
        ImageNet(samples, config.preprocess, augment, **settings),
        ImageNet(held_out, config.preprocess, **settings),
        classes,
    )


def _model(config: ClassifierConfig, weights: Path | None, device: torch.device) -> CSPNet:
    sync = config.sync_batchnorm and world_size() > 1
    if sync and device.type == "cpu":
        raise InputError("sync_batchnorm=true works on GPUs alone: set it to false, or device=cuda")
    model = create_model(
        config.model, config.num_classes, weights, ignore_head=config.ignore_head,
        drop_path=config.train.drop_path, batchnorm="sync" if sync else "batch",
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last).to(device) if config.channels_last else model.to(device)


def _report(entry: dict[str, float], epochs: int, speed: float) -> None:
    skipped = f", {entry['skipped']:.0f} broken images skipped" if entry["skipped"] else ""
    skipped += f", {entry['val_skipped']:.0f} held-out ones, which top-1 is without" if entry["val_skipped"] else ""
    print(
        f"epoch {entry['epoch']}/{epochs}: loss {entry['loss']:.3f}, top-1 {100 * entry['top1']:.2f}, "
        f"top-5 {100 * entry['top5']:.2f}, {speed:.0f} images/s{skipped}",
        flush=True,
    )


def _metadata(config: ClassifierConfig, name: str, classes: list[str]) -> dict[str, Any]:
    include: Any = {
        "model": True, "num_classes": True, "train": True, "seed": True, "amp": True, "sync_batchnorm": True,
        "data": {"batch_size"},
    }  # fmt: skip
    return {
        "task": "classification",
        "model": name,
        "num_classes": config.num_classes,
        "classes": classes,
        "preprocess": config.preprocess.model_dump(),
        # Without paths: who trained it where is nobody's business.
        "config": config.model_dump(mode="json", include=include) | {"processes": world_size()},
    }
