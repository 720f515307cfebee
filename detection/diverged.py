"""What is kept of the batch at which a run diverged: its pictures with their boxes, and the figures, for inspection."""

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from backbones.files import write_json
from detection.images import TrainingImages


def keep_batch(
    folder: Path, images: TrainingImages, indices: Sequence[int], classes: Sequence[str], facts: dict[str, Any]
) -> None:
    """Write the images `indices` as training saw them, `<image id>.png` each, and `batch.json` with `facts` and every
    image's boxes [K, 4] (x1, y1, x2, y2 in the picture's pixels) and classes. The folder is made as a whole.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        entries = [_keep_image(aside, images, index, classes) for index in indices]
        write_json(aside / "batch.json", facts | {"images": entries})
        aside.chmod(0o755)  # mkdtemp made it 0700
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _keep_image(folder: Path, images: TrainingImages, index: int, classes: Sequence[str]) -> dict[str, Any]:
    record = images.records[index]
    image, target = images[index]  # drawn again, to the bit: augmentation depends on seed, epoch and index alone
    picture = _draw(image, target, classes).permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(folder / f"{record.image_id}.png")
    boxes = [[value if math.isfinite(value) else str(value) for value in box] for box in target["boxes"].tolist()]
    return {
        "image_id": record.image_id,
        "file": record.path.name,
        "boxes": boxes,
        "classes": [classes[label - 1] for label in target["labels"].tolist()],
    }


def _draw(image: Tensor, target: dict[str, Tensor], classes: Sequence[str]) -> Tensor:
    """float [3, h, w] in [0, 1] -> uint8 alike, with the boxes that can be drawn."""
    pixels = (image * 255).round().byte()
    boxes, labels = target["boxes"], target["labels"]
    drawable = boxes.isfinite().all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)
    names = [classes[label - 1] for label in labels[drawable].tolist()]
    return draw_bounding_boxes(pixels, boxes[drawable], names, colors="red") if names else pixels
