"""The config of a detector's run; no torch here."""

from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from backbones.config import Recipe
from backbones.preprocess import DetectorPreprocess
from backbones.schema import Device, Section, Seed

Norm = Literal["frozen", "batch", "sync", "group"]
Level = Literal["c2", "c3", "c4", "c5"]
FrozenStages = Literal["none", "stem", "c2", "c3", "c4", "c5"]
ExtraLevels = Literal["none", "pool", "p6p7"]

LEVELS: tuple[Level, ...] = get_args(Level)


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
    min_sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()  # of the short side, one at random; empty is preprocess's
    mosaic: float = Field(default=0.0, ge=0, le=1)  # probability of four images in one

    @field_validator("scale_jitter")
    @classmethod
    def _in_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 < value[0] <= value[1]:
            raise ValueError("give the smallest and the largest factor, such as [0.1, 2.0]")
        return value


class DetectorSettings(Section):
    """What a detector is made of. None means torchvision's default."""

    model: str
    norm: Norm | None = None  # of the backbone; None: frozen over pretrained weights, else batch (sync under torchrun)
    frozen_stages: FrozenStages | None = None  # the backbone stays as it is up to here; None: c2 if it is pretrained
    fpn_channels: int = Field(default=256, ge=64, multiple_of=32)  # the heads' GroupNorm has 32 groups
    levels: tuple[Level, ...] | None = None  # that the neck takes; torchvision's end with c5
    extra_levels: ExtraLevels | None = None  # above them; anchors follow
    score_threshold: float | None = Field(default=None, ge=0, lt=1)
    nms_iou: float | None = Field(default=None, gt=0, le=1)
    max_detections: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _makes_a_pyramid(self) -> Self:
        levels, frozen = self.levels, self.frozen_stages
        if levels is not None and (not levels or "".join(levels) not in "".join(LEVELS)):
            raise ValueError(f"levels={list(levels)}: give neighbours of {list(LEVELS)} in this order")
        if levels is not None and frozen in LEVELS[LEVELS.index(levels[-1]) + 1 :]:
            raise ValueError(f"frozen_stages={frozen} is above the highest of levels={list(levels)}: give {levels[-1]}")
        return self


class DetectorConfig(DetectorSettings):
    """A run of `python -m detection {train,eval}`."""

    weights: str | None = None  # a whole detector's, to evaluate or to start from; `torchvision` for its published ones
    weights_backbone: str | None = None  # ImageNet weights to start from
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
