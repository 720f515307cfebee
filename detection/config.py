"""The config of a detector's run; no torch here."""

from pydantic import Field

from backbones.preprocess import DetectorPreprocess
from backbones.schema import Device, OptimizerName, Section, Seed


class CocoData(Section):
    """COCO-format annotations and the folders that their file names are in."""

    train_images: str | None = None
    train_annotations: str | None = None
    images: str | None = None  # evaluated
    annotations: str | None = None
    batch_size: int = Field(default=8, ge=1)
    workers: int = Field(default=2, ge=0)


class DetectorTraining(Section):
    """Linear warm-up, cosine decay to zero, box-aware augmentation."""

    epochs: int = Field(default=12, ge=1)
    optimizer: OptimizerName = "sgd"
    lr: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup_epochs: float = Field(default=0.5, ge=0)
    clip_grad_norm: float = Field(default=10.0, gt=0)
    horizontal_flip: float = Field(default=0.5, ge=0, le=1)
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    color_jitter: float = Field(default=0.2, ge=0, le=1)
    random_crop: float = Field(default=0.3, ge=0, le=1)  # probability; a crop keeps every box


class DetectorConfig(Section):
    """A run of `python -m detection {train,eval}`. None among the settings means torchvision's default."""

    model: str
    weights_backbone: str | None = None  # ImageNet weights to start from
    weights: str | None = None  # a trained detector, to evaluate
    fpn_channels: int = Field(default=256, ge=64, multiple_of=32)  # the heads' GroupNorm has 32 groups
    frozen_batchnorm: bool | None = None  # None: frozen over pretrained weights alone
    score_threshold: float | None = Field(default=None, ge=0, lt=1)
    nms_iou: float | None = Field(default=None, gt=0, le=1)
    max_detections: int | None = Field(default=None, ge=1)
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
