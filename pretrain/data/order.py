"""The order in which samples are seen: a pure function of (seed, corpus size, position)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# Streams of one seed that must not meet: epoch permutations, a sample's augmentation, a step's masks, its dropout.
PERMUTATION, AUGMENTATION, MASKS, DROPOUT = range(4)


def generator(seed: int, stream: int, *position: int) -> np.random.Generator:
    """A generator for one purpose at one position, the same in every process and for any number of workers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, *position))))


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch, int64 `[size]`."""
    return generator(seed, PERMUTATION, epoch).permutation(size)


def rows_at(positions: np.ndarray, seed: int, size: int) -> np.ndarray:
    """The rows seen at given positions of the endless run of epochs."""
    epochs, offsets = np.divmod(positions, size)
    return np.array([permutation(seed, int(epoch), size)[at] for epoch, at in zip(epochs, offsets, strict=True)])


def positions_of(
    step: int, micro_step: int, rank: int, world_size: int, micro_batch: int, accumulation: int
) -> np.ndarray:
    """The positions one rank reads for one micro-batch of a step, int64 `[micro_batch]`.

    A step covers `world_size * accumulation * micro_batch` consecutive positions, so the set of samples of a step
    depends on the global batch alone, not on how it is spread over ranks.
    """
    global_batch = world_size * accumulation * micro_batch
    first = step * global_batch + (micro_step * world_size + rank) * micro_batch
    return np.arange(first, first + micro_batch)
