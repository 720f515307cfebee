"""BentoML: a service on as many workers as there are cores.

Without its adaptive batching, which takes a list of pictures in a request.
"""

from pathlib import Path
from typing import Any

import bentoml
from picture import CORES, Model, prepare


@bentoml.service(workers=CORES)
class Classifier:
    def __init__(self) -> None:
        self.model = Model(1)

    @bentoml.api  # type: ignore[untyped-decorator]
    def classify(self, image: Path) -> dict[str, Any]:
        return self.model.top5([prepare(image.read_bytes())])[0]
