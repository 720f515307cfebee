"""TensorBoard's log of a training run, where TensorBoard is installed."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Log = Any  # torch's SummaryWriter, or None where there is no TensorBoard


@contextmanager
def tensorboard(folder: Path, first_epoch: int) -> Iterator[Log]:
    """A writer to `folder`, or None without the package; says which. What an earlier run wrote of the epochs from
    `first_epoch` on is dropped.
    """
    if importlib.util.find_spec("tensorboard") is None:
        print("no TensorBoard log: pip install 'cspnet[tensorboard]' for one")
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    print(f"TensorBoard: {folder}")
    with SummaryWriter(str(folder), purge_step=first_epoch) as log:
        yield log


def write_epoch(log: Log, figures: Mapping[str, float]) -> None:
    """Each figure of an epoch, but its number, as a curve; at once, so that a run can be watched."""
    if log is not None:
        for name, value in figures.items():
            if name != "epoch":
                log.add_scalar(name, value, int(figures["epoch"]))
        log.flush()
