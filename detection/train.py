"""The work of `python -m detection train`: from COCO annotations to weights, with a checkpoint an epoch."""

from pathlib import Path
from typing import Any

import torch

from backbones.checkpoint import load_checkpoint, pick_device, save_checkpoint, seed_everything
from backbones.engine import warmup_cosine
from backbones.errors import InputError
from backbones.files import write_json
from backbones.optim import create_optimizer
from backbones.weights import save_weights
from detection.augment import DetectionAugment
from detection.coco import CocoSet, EvaluationImages, TrainingImages, create_loader, read_coco
from detection.coco_eval import evaluate as coco_figures
from detection.config import DetectorConfig
from detection.engine import evaluate, train_one_epoch
from detection.evaluate import spec_of
from detection.models import DetectorSpec, build_detector


def run_train(config: DetectorConfig) -> dict[str, Any]:
    """Train, evaluate after each epoch, and return the best epoch's figures and the history.

    Writes to `config.output`: `last.pt` to resume from, `best.safetensors` by AP50, `history.json`.

    Raises:
        InputError: no data, a loss that is not finite, or nothing to resume from.
    """
    seed_everything(config.seed)
    device, data, train = pick_device(config.device), config.data, config.train
    training_set, held_out = _data(config)
    augment = DetectionAugment(
        train.horizontal_flip, train.vertical_flip, train.color_jitter, train.random_crop, config.seed
    )
    images = TrainingImages(training_set, config.preprocess, augment)
    val_loader = create_loader(EvaluationImages(held_out, config.preprocess), data.batch_size, data.workers)

    spec = spec_of(config, len(training_set.classes) + 1)
    model = build_detector(spec, config.preprocess, config.weights_backbone).to(device)
    optimizer = create_optimizer(model, train.optimizer, train.lr, train.momentum, train.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp and device.type == "cuda")
    output = Path(config.output)
    history: list[dict[str, float]] = []
    if config.resume:
        history = load_checkpoint(output / "last.pt", model, optimizer, scaler)["history"]

    for epoch in range(len(history), train.epochs):
        augment.epoch = epoch
        loader = create_loader(images, data.batch_size, data.workers, shuffle_seed=config.seed + epoch)
        steps, done = train.epochs * len(loader), epoch * len(loader)
        warmup = round(train.warmup_epochs * len(loader))
        losses = train_one_epoch(
            model, loader, optimizer, scaler,
            [train.lr * warmup_cosine(done + step, steps, warmup) for step in range(len(loader))],
            clip_grad_norm=train.clip_grad_norm, amp=config.amp, title=f"epoch {epoch + 1}/{train.epochs}",
        )  # fmt: skip
        figures = coco_figures(str(data.annotations), evaluate(model, val_loader, training_set.category_ids))
        history.append({"epoch": epoch + 1} | losses | {name: figures[name] for name in ("AP", "AP50", "AP75")})
        print(
            f"epoch {epoch + 1}/{train.epochs}: loss {losses['loss']:.3f}, "
            f"AP {figures['AP']:.4f}, AP50 {figures['AP50']:.4f}"
        )
        if figures["AP50"] >= max(entry["AP50"] for entry in history):
            save_weights(output / "best.safetensors", model, _metadata(config, spec, training_set))
        save_checkpoint(output / "last.pt", model, optimizer, scaler, {"history": history})
        write_json(output / "history.json", history)
    best = max(history, key=lambda entry: entry["AP50"])
    return {"best": best, "history": history, "weights": str(output / "best.safetensors")}


def _data(config: DetectorConfig) -> tuple[CocoSet, CocoSet]:
    training_set = read_coco(config.data.train_images, config.data.train_annotations, "data.train_")
    held_out = read_coco(config.data.images, config.data.annotations, "data.")
    print(f"training: {training_set}\nheld out: {held_out}")
    if not any(len(record.labels) for record in training_set.records):
        raise InputError(f"{config.data.train_annotations} has no object to learn from")
    if training_set.category_ids != held_out.category_ids:
        raise InputError("the training and the held-out annotations have different category ids")
    return training_set, held_out


def _metadata(config: DetectorConfig, spec: DetectorSpec, dataset: CocoSet) -> dict[str, Any]:
    return {
        "task": "detection",
        "model": spec.model,
        "detector": spec.model_dump(),
        "classes": list(dataset.classes),
        "category_ids": list(dataset.category_ids),
        "preprocess": config.preprocess.model_dump(),
        "config": config.model_dump(mode="json"),
    }
