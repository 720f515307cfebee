"""A batch job as a source of predictions."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from serving.artifact import Artifact
from serving.batch import run_batch
from serving.evaluate import BATCH_SIZE
from serving.jobs.config import Actors, BatchConfig, BatchModel
from serving.jobs.results import Row, iter_rows
from serving.sessions.providers import ON_GPU, Provider

NAME = "model"


class BatchSource:
    """A job on Ray Data for each call, below `folder`."""

    def __init__(self, artifact: Path, provider: Provider, metadata: Artifact, folder: Path):
        self.name, self.metadata = "batch", metadata
        self._artifact, self._provider, self._folder = artifact, provider, folder

    def rows(self, paths: Sequence[Path]) -> Iterator[Row]:
        self._folder.mkdir(parents=True, exist_ok=True)
        output = Path(tempfile.mkdtemp(dir=self._folder))
        images = output / "images.txt"
        images.write_text("".join(f"{path.absolute()}\n" for path in paths))
        model = BatchModel(name=NAME, artifact=str(self._artifact), provider=self._provider)
        actors = Actors(num_gpus=float(self._provider in ON_GPU))
        job = str(output / "job")
        run_batch(BatchConfig(input=str(images), output=job, batch_size=BATCH_SIZE, actors=actors, models=(model,)))
        yield from iter_rows(output / "job" / NAME)
