"""Which rank this process is, and what several ranks hold together; alone, each function is the identity."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

T = TypeVar("T")

# Longer than one rank needs to write and upload a checkpoint; who hangs in a step is noticed by `pretrain.watchdog`.
_TIMEOUT = timedelta(hours=4)


def rank_and_world_size() -> tuple[int, int]:
    """(rank, world size), from the environment a launcher sets."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def device_of_rank() -> torch.device:
    """The GPU of this rank, or the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def init_process_group(device: torch.device) -> None:
    """Join the launcher's process group, or make one of this process alone."""
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank, world_size = rank_and_world_size()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=rank, world_size=world_size)  # type: ignore[attr-defined]


def shared_store() -> Store:
    """A place of keys and values that all ranks see."""
    return dist.distributed_c10d._get_default_store()


_WITHOUT_COMMUNICATION = ContextVar("alone", default=False)


@contextmanager
def without_communication() -> Iterator[None]:
    """Within, this process is a world of its own: functions of several ranks exchange nothing."""
    token = _WITHOUT_COMMUNICATION.set(True)
    try:
        yield
    finally:
        _WITHOUT_COMMUNICATION.reset(token)


def is_distributed() -> bool:
    return (
        not _WITHOUT_COMMUNICATION.get() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    )


def barrier() -> None:
    """Wait for all ranks."""
    if is_distributed():
        dist.barrier()


def first_local_rank() -> int:
    """The rank that acts for this one's machine."""
    return rank_and_world_size()[0] - int(os.environ.get("LOCAL_RANK", 0))


def broadcast_object(value: T) -> T:
    """What the first rank passes."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def all_gather_object(value: T) -> list[T]:
    """What every rank passes, in the order of the ranks."""
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over all ranks, in place; the value itself where there is one process."""
    if is_distributed():
        dist.all_reduce(value)
    return value


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean over all ranks, in place."""
    return all_reduce_sum(value).div_(dist.get_world_size()) if is_distributed() else value


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Rows of all ranks in the order of the ranks, `[world size * n, ...]`; each rank gets the gradients of its own.

    The ranks' gradients are averaged afterwards, so a loss that is a mean over each rank's rows has the gradient of
    the mean over all rows.
    """
    if not is_distributed():
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(list(all_gather(x.contiguous())))


def first_gathered_row(rows: int) -> int:
    """Where this rank's rows stand among all that `all_gather_with_grad` gives, if every rank has as many."""
    return dist.get_rank() * rows if is_distributed() else 0
