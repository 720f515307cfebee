"""What a training run does when: which images each process takes in each step, and at what learning rate."""

import torch
from torch import Tensor

from backbones.augment import sample_seed
from backbones.config import Recipe
from backbones.distributed import rank, world_size
from backbones.errors import InputError
from backbones.optim import warmup_cosine, warmup_multistep, warmup_poly, warmup_step


class Plan:
    """The steps of a run over `images` images in batches of `batch`.

    A step takes `accumulate` batches from each process. What is left of an epoch's shuffled images when no whole
    step can be made of it is left out of that epoch.

    Attributes:
        step: images a step takes, over all processes.
        steps: steps an epoch.
        lr: the full learning rate, for `step` images.
        warmup_epochs: the config's, or half of a single epoch.

    Raises:
        InputError: fewer images than a step takes, or milestones that `multistep` lacks or the run does not reach.
    """

    def __init__(self, train: Recipe, images: int, batch: int, seed: int):
        self.train, self.images, self.batch, self.seed = train, images, batch, seed
        self.step = batch * train.accumulate * world_size()
        self.steps = images // self.step
        if not self.steps:
            raise InputError(f"{images} images to train on are fewer than a step's {self}: lower data.batch_size")
        self.warmup_epochs = min(train.warmup_epochs, 0.5) if train.epochs == 1 else train.warmup_epochs
        reached = train.milestones and all(0 < milestone < train.epochs for milestone in train.milestones)
        if train.schedule == "multistep" and not reached:
            raise InputError(
                f"train.milestones={[*train.milestones]} of train.schedule=multistep: give epochs that lie within "
                f"train.epochs={train.epochs}, such as [{2 / 3 * train.epochs:.3g}]"
            )
        self.lr = train.lr if train.lr_batch is None else train.lr * self.step / train.lr_batch

    def __str__(self) -> str:
        return f"{self.step} (batch {self.batch} x accumulate {self.train.accumulate} x {world_size()} processes)"

    def describe(self) -> str:
        """The plan in a few lines."""
        scaled = "" if self.train.lr_batch is None else f" = {self.train.lr:g} x {self.step} / {self.train.lr_batch}"
        rest = self.images - self.steps * self.step
        return (
            f"{self.train.epochs} epochs of {self.steps} steps; images a step: {self}; left out of each epoch: {rest}\n"
            f"learning rate {self.lr:g}{scaled}, {self.train.schedule} after {self.warmup_epochs:g} epochs"
        )

    def order(self, epoch: int) -> list[int]:
        """The images of this process in an epoch, each once over all processes, in the order of its batches.

        As long as `arrange` leaves them so, the images of a step do not depend on how it is divided into batches and
        processes.
        """
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch))
        shuffled = torch.randperm(self.images, generator=generator)[: self.steps * self.step]
        indices: list[int] = self.arrange(shuffled).view(-1, world_size(), self.batch)[:, rank()].flatten().tolist()
        return indices

    def arrange(self, images: Tensor) -> Tensor:
        """An epoch's shuffled images [n] in the order in which batches are cut from them."""
        return images

    def lrs(self, epoch: int) -> list[float]:
        """The learning rate of each step of an epoch."""
        total, warmup = self.train.epochs * self.steps, round(self.warmup_epochs * self.steps)
        return [self.lr * self._share(epoch * self.steps + i, total, warmup) for i in range(self.steps)]

    def _share(self, step: int, total: int, warmup: int) -> float:
        if self.train.schedule == "poly":
            return warmup_poly(step, total, warmup, self.train.poly_power)
        if self.train.schedule == "step":
            return warmup_step(step, warmup, round(self.train.decay_epochs * self.steps), self.train.decay_rate)
        if self.train.schedule == "multistep":
            milestones = [round(milestone * self.steps) for milestone in self.train.milestones]
            return warmup_multistep(step, warmup, milestones, self.train.decay_rate)
        return warmup_cosine(step, total, warmup)
