"""What is kept of the batch at which a run diverged: its pictures with their boxes, and the figures, for inspection."""

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from backbones.files import write_json
from detection.drawing import draw_boxes
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
    names = [classes[label - 1] for label in target["labels"].tolist()]
    picture = Image.fromarray(image.numpy())
    draw_boxes(picture, target["boxes"].tolist(), names, ["red"] * len(names))
    picture.save(folder / f"{record.image_id}.png")
    boxes = [[value if math.isfinite(value) else str(value) for value in box] for box in target["boxes"].tolist()]
    return {
        "image_id": record.image_id,
        "file": record.path.name,
        "boxes": boxes,
        "classes": names,
    }
