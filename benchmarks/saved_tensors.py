"""What a forward pass keeps for the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Kept:
    """Storages that were kept, each counted once."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[int, Tensor]] = {}

    def add(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        self._storages[storage.data_ptr()] = (storage.nbytes(), value)  # held, so that no address comes twice

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self._storages.values())


@contextlib.contextmanager
def kept_for_backward(module: nn.Module) -> Iterator[Kept]:
    """Count what is kept by the passes within, the module's parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = Kept()

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept.add(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield kept
