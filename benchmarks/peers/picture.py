"""What every peer does with a picture: Pillow and numpy, as each project's own examples would; no other package.

The artefact of MODEL takes uint8 [N, CROP, CROP, 3] and gives probabilities [N, C].
"""

import io
import os
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps

RESIZE, CROP = int(os.environ["RESIZE"]), int(os.environ["CROP"])  # the short side, and what is kept of both
FILTER = Image.Resampling[os.environ["INTERPOLATION"].upper()]
CORES = int(os.environ["CORES"])  # that the process may use; a container's share may be less than it sees


def prepare(data: bytes) -> Any:
    """The middle of the upright, resized picture, uint8 [CROP, CROP, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    width, height = upright.size
    scale = RESIZE / min(width, height)
    resized = upright.resize((round(scale * width), round(scale * height)), FILTER)
    left, top = (resized.width - CROP) // 2, (resized.height - CROP) // 2
    return np.asarray(resized.crop((left, top, left + CROP, top + CROP)))


class Model:
    """The artefact on onnxruntime's CPU, by so many threads."""

    def __init__(self, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])

    def top5(self, pictures: list[Any]) -> list[dict[str, Any]]:
        """The best five classes of each picture."""
        (probabilities,) = self.session.run(["probabilities"], {"images": np.stack(pictures)})
        return [
            {"predictions": [{"index": int(i), "score": float(row[i])} for i in np.argsort(-row)[:5]]}
            for row in probabilities
        ]
