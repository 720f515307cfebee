"""The config of a detector's run; no torch here."""

from typing import Literal

from pydantic import Field, field_validator

from backbones.config import Recipe
from backbones.preprocess import DetectorPreprocess
from backbones.schema import Device, Section, Seed

Norm = Literal["frozen", "batch", "sync", "group"]
Level = Literal["c2", "c3", "c4", "c5"]


class CocoData(Section):
    """COCO-format annotations and the folders that their file names are in."""

    train_images: str | None = None
    train_annotations: str | None = None
    images: str | None = None  # evaluated
    annotations: str | None = None
    batch_size: int = Field(default=8, ge=1)  # of each process
    workers: int = Field(default=2, ge=0)
    aspect_ratio_groups: int = Field(default=3, ge=0)  # groups of like ratios to either side of 1; 0 is off


class DetectorTraining(Recipe):
    """A recipe, and what is done to images and boxes alike."""

    epochs: int = Field(default=12, ge=1)
    lr: float = Field(default=0.01, gt=0)
    warmup_epochs: float = Field(default=0.5, ge=0)
    clip_grad_norm: float | None = Field(default=10.0, gt=0)
    horizontal_flip: float = Field(default=0.5, ge=0, le=1)
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    random_crop: float = Field(default=0.0, ge=0, le=1)  # probability; a crop keeps every box
    scale_jitter: tuple[float, float] | None = None  # of the fitted size, then cropped to it: large-scale jitter
    min_sizes: tuple[int, ...] = ()  # multi-scale: the short side is one of these; empty is preprocess.min_size alone
    mosaic: float = Field(default=0.0, ge=0, le=1)  # probability of four images in one

    @field_validator("scale_jitter")
    @classmethod
    def _in_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError("give the smallest and the largest factor, such as [0.1, 2.0]")
        return value


class DetectorConfig(Section):
    """A run of `python -m detection {train,eval}`. None among the settings means torchvision's default."""

    model: str
    weights: str | None = None  # a whole detector's, to evaluate or to start from; `torchvision` for its published ones
    weights_backbone: str | None = None  # ImageNet weights to start from
    norm: Norm | None = None  # of the backbone; None: frozen over pretrained weights, else batch (sync under torchrun)
    frozen_stages: Literal["none", "stem", "c2", "c3", "c4", "c5"] | None = None  # None: c2 over pretrained weights
    fpn_channels: int = Field(default=256, ge=64, multiple_of=32)  # the heads' GroupNorm has 32 groups
    levels: tuple[Level, ...] | None = None  # that the neck takes
    extra_levels: Literal["none", "pool", "p6p7"] | None = None  # above them; anchors follow
    score_threshold: float | None = Field(default=None, ge=0, lt=1)
    nms_iou: float | None = Field(default=None, gt=0, le=1)
    max_detections: int | None = Field(default=None, ge=1)
    metric: Literal["pycocotools", "fast"] = "pycocotools"  # fast: the same figures from faster-coco-eval
    data: CocoData = CocoData()
    preprocess: DetectorPreprocess
    train: DetectorTraining = DetectorTraining()
    seed: Seed = 0
    device: Device = "auto"
    amp: bool = False
    resume: bool = False  # go on from the output folder's last.pt
    output: str = "runs/detector"

    def thresholds(self) -> dict[str, float]:
        """Those of the detector's thresholds that the config sets, by name."""
        return self.model_dump(include={"score_threshold", "nms_iou", "max_detections"}, exclude_none=True)
