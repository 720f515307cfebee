"""Box-aware training augmentation, through albumentations; reproducible whatever the number of workers."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from backbones.augment import albumentations, sample_seed


class DetectionAugment:
    """Flips, a crop that keeps every box, and colour jitter; `epoch` is set by the training loop."""

    def __init__(
        self, horizontal_flip: float, vertical_flip: float, color_jitter: float, random_crop: float, seed: int
    ):
        strength = (1 - color_jitter, 1 + color_jitter)
        self.transform = albumentations.Compose(
            [
                albumentations.BBoxSafeRandomCrop(erosion_rate=0.0, p=random_crop),
                albumentations.HorizontalFlip(p=horizontal_flip),
                albumentations.VerticalFlip(p=vertical_flip),
                albumentations.ColorJitter(
                    strength, strength, strength, hue=(-color_jitter / 10, color_jitter / 10), p=0.8
                ),
            ],
            # clip: rounding may leave a box a hair outside its image, which albumentations else rejects
            bbox_params=albumentations.BboxParams(
                "pascal_voc", label_fields=["labels"], clip=True, filter_invalid_bboxes=True
            ),
        )
        self.seed, self.epoch = seed, 0

    def __call__(
        self, image: Image.Image, boxes: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], index: int
    ) -> tuple[Image.Image, npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """An image, its boxes [K, 4] as x1, y1, x2, y2 in pixels, and labels [K], all augmented alike."""
        self.transform.set_random_seed(sample_seed(self.seed, self.epoch, index))
        result = self.transform(image=np.asarray(image), bboxes=boxes, labels=labels)
        moved = np.asarray(result["bboxes"], np.float32).reshape(-1, 4)
        return Image.fromarray(result["image"]), moved, np.asarray(result["labels"], np.int64)
