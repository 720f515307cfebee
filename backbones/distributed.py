"""One process or many under torchrun: who am I, what does everybody have."""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from backbones.errors import InputError

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # for the main process's figures and report; NCCL's own is ten minutes


def rank() -> int:
    """This process's number; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def grouped() -> bool:
    """Whether the environment describes several processes of one run: torchrun's, or what a launcher such as srun or
    mpirun is told to set: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    """
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """Of one of several processes, its number on its machine, by which it takes a card."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    return int(os.environ["RANK"]) % max(1, torch.cuda.device_count())


def check_alone(command: str) -> None:
    """Refuse several processes, of which each would do the whole work.

    Raises:
        InputError: there are several.
    """
    if grouped():
        raise InputError(f"{command} works in one process alone, not in {os.environ['WORLD_SIZE']}: leave torchrun out")


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the group that torchrun's environment describes, and leave it at the end; alone, or in it, do nothing.

    Yields the device of this process: in a group on CUDA, the card of its local rank.

    Raises:
        InputError: the environment describes a group only in part.
    """
    if not grouped() or dist.is_initialized():  # a process joins once in its life
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except ValueError as error:  # such as MASTER_ADDR, which srun and mpirun do not set
        raise InputError(
            f"RANK and WORLD_SIZE are set, but no group can be made ({error}): start by torchrun"
        ) from None
    try:
        yield device
    finally:
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """Everybody's `value`, in order of rank, on every process; it is pickled between processes of one run."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T]) -> T:
    """What `work` gives in this process.

    Raises:
        InputError: one of the processes met it. All raise it, so that none waits in vain for another.
    """
    if world_size() == 1:
        return work()
    results, problem = [], None
    try:
        results.append(work())
    except InputError as error:
        problem = str(error)
    for met in gather(problem):
        if met is not None:
            raise InputError(met)
    return results[0]


def everywhere(work: Callable[[], T]) -> list[T]:
    """What `work` gives in each process of torchrun, in order of rank, on every one.

    Raises:
        InputError: one of them met it; all raise it.
    """
    return gather(together(work))


def collect(work: Callable[[], T]) -> list[T]:
    """What `work` gives in each process, in order of rank, on the main one; the others, which need no room for it, have
    nothing.

    Raises:
        InputError: one of them met it; all raise it.
    """
    mine = together(work)
    if not dist.is_initialized():
        return [mine]
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(mine, values)
    return values or []


def on_main(work: Callable[..., object], *args: object) -> None:
    """`work(*args)` in the main process alone, while the others wait.

    Raises:
        InputError: it met it; all raise it.
    """

    def mine() -> None:
        if is_main():
            work(*args)

    together(mine)
