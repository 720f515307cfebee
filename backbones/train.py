"""The work of `python -m backbones train`: from an image folder to weights, with a checkpoint an epoch."""

from typing import Any

import torch

from backbones.augment import TrainAugment
from backbones.checkpoint import Run, pick_device, seed_everything
from backbones.config import ClassifierConfig
from backbones.cspnet import create_model, get_variant
from backbones.engine import evaluate, train_one_epoch, warmup_cosine
from backbones.errors import InputError
from backbones.imagenet import ImageNet, create_loader, list_samples
from backbones.optim import create_optimizer


def run_train(config: ClassifierConfig) -> dict[str, Any]:
    """Train, evaluate after each epoch, and return the best epoch's figures and the history.

    Writes to `config.output`: `last.pt` to resume from, `best.safetensors` by top-1, `history.json`.

    Raises:
        InputError: no data, a loss that is not finite, or nothing to resume from.
    """
    get_variant(config.model)  # a misspelt name is said before the data is read
    seed_everything(config.seed)
    device, train = pick_device(config.device), config.train
    samples, classes = list_samples(config.data, config.data.train_split, config.num_classes)
    held_out, val_classes = list_samples(config.data, config.data.split, config.num_classes)
    if config.data.batch_size == 1:
        raise InputError("data.batch_size=1: BatchNorm cannot train on one image; give at least 2")
    if {sample.path for sample in samples} & {sample.path for sample in held_out}:
        raise InputError(f"{config.data.root} has no separate {config.data.split!r} folder to evaluate on: make one")
    if val_classes != classes:
        raise InputError(f"{config.data.root}: the class folders of the training and validation splits differ")
    augment = TrainAugment(
        config.preprocess.crop, train.min_scale, train.horizontal_flip, train.vertical_flip, train.color_jitter,
        config.seed,
    )  # fmt: skip
    training_set = ImageNet(samples, config.preprocess, augment)
    val_loader = create_loader(ImageNet(held_out, config.preprocess), config.data.batch_size, config.data.workers)

    model = create_model(config.model, config.num_classes, config.weights, ignore_head=config.ignore_head).to(device)
    optimizer = create_optimizer(model, train.optimizer, train.lr, train.momentum, train.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp and device.type == "cuda")
    run = Run(config, model, optimizer, scaler, "top1", _metadata(config, model.name, classes))

    for epoch in range(len(run.history), train.epochs):
        augment.epoch = epoch
        loader = create_loader(
            training_set, config.data.batch_size, config.data.workers, shuffle_seed=config.seed + epoch
        )
        steps, done = train.epochs * len(loader), epoch * len(loader)
        warmup = round(train.warmup_epochs * len(loader))
        figures = train_one_epoch(
            model, loader, optimizer, scaler, config.preprocess,
            [train.lr * warmup_cosine(done + step, steps, warmup) for step in range(len(loader))],
            label_smoothing=train.label_smoothing, amp=config.amp, title=f"epoch {epoch + 1}/{train.epochs}",
        )  # fmt: skip
        result = evaluate(model, val_loader, config.preprocess, classes)
        print(
            f"epoch {epoch + 1}/{train.epochs}: loss {figures['loss']:.3f}, "
            f"top-1 {100 * result['top1']:.2f}, top-5 {100 * result['top5']:.2f}"
        )
        run.finish_epoch(figures | {"top1": result["top1"], "top5": result["top5"]})
    return run.result()


def _metadata(config: ClassifierConfig, name: str, classes: list[str]) -> dict[str, Any]:
    return {
        "task": "classification",
        "model": name,
        "num_classes": config.num_classes,
        "classes": classes,
        "preprocess": config.preprocess.model_dump(),
        # Without paths: who trained it where is nobody's business.
        "config": config.model_dump(mode="json", include={"model", "num_classes", "train", "seed", "amp"}),
    }
