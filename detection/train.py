"""The work of `python -m detection train`: from COCO annotations to weights, with a checkpoint an epoch."""

from typing import Any

import torch

from backbones.augment import sample_seed
from backbones.checkpoint import Run, pick_device, seed_everything
from backbones.distributed import check_alone
from backbones.errors import InputError
from backbones.files import sha256
from backbones.optim import create_optimizer, warmup_cosine
from detection.augment import DetectionAugment
from detection.coco import CocoSet, EvaluationImages, TrainingImages, create_loader, read_coco
from detection.coco_eval import evaluate as coco_figures
from detection.config import DetectorConfig
from detection.engine import evaluate, train_one_epoch
from detection.models import DetectorSpec, build_detector, canonical_name, spec_of


def run_train(config: DetectorConfig) -> dict[str, Any]:
    """Train, evaluate after each epoch, and return the best epoch's figures and the history.

    Writes to `config.output`: `last.pt` to resume from, `best.safetensors` by AP50, `history.json`.

    Raises:
        InputError: no data, a loss that is not finite, nothing to resume from, or several processes.
    """
    check_alone("python -m detection train")
    if config.weights is not None:
        raise InputError("weights is for eval: train from ImageNet weights with weights_backbone, or go on with resume")
    canonical_name(config.model)  # a misspelt name is said before the data is read
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
    facts = {"images": len(training_set.records), "annotations_sha256": sha256(str(data.train_annotations))}
    run = Run(config, model, optimizer, scaler, "AP50", _metadata(config, spec, training_set), facts=facts)

    for epoch in range(len(run.history), train.epochs):
        seed_everything(sample_seed(config.seed, epoch))  # so that a resumed epoch draws what an undisturbed one draws
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
        print(
            f"epoch {epoch + 1}/{train.epochs}: loss {losses['loss']:.3f}, "
            f"AP {figures['AP']:.4f}, AP50 {figures['AP50']:.4f}"
        )
        run.finish_epoch(losses | {name: figures[name] for name in ("AP", "AP50", "AP75")})
    return run.result()


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
        # Without paths: who trained it where is nobody's business.
        "config": config.model_dump(mode="json", include={"model", "fpn_channels", "train", "seed", "amp"}),
    }
