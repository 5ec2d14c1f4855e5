"""The order in which samples are seen: a pure function of (seed, epoch, corpora), evaluated place by place.

Nothing of the length of an epoch is kept, so the order of a billion samples costs no memory. The number of ranks and
workers has no part in it: they only share out the places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Streams of one seed that must not meet.
PERMUTATION, AUGMENTATION, MASKS, DROPOUT, SHARDS, SLOTS, SUBSTITUTES = range(7)
_ROUNDS = 6


def generator(seed: int, stream: int, *position: int) -> np.random.Generator:
    """A generator for one purpose at one position, the same in every process and for any number of workers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, *position))))


def feistel_permutation(positions: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """A pseudo-random permutation of `range(size)`, at some places only.

    A Feistel network over the next power of four, walked until the value falls into the range (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002).

    Args:
        places: int64 `[n]`, 0 <= place < size.
        size: length of the permutation.
        key: integers that choose it.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], half, _round_keys(tuple(key)))
        outside = values >= size
    return values.astype(np.int64)


@lru_cache(maxsize=256)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)


def _feistel(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014); products wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class _Windows:
    """The windows of one epoch: a few shards each, read together in random order."""

    shards: list[np.ndarray]
    """The shards of each window."""
    ends: np.ndarray
    """Places after each window, int64 `[windows]`."""


class SampleOrder:
    """Which row is seen at which place of the endless run of epochs.

    An epoch has as many places as there are rows. Without weights every row has one; with them a row has its share of
    the places, rounded up or down by chance (systematic resampling), so that each epoch is as near to the weights as
    whole numbers allow.

    Args:
        seed: the training's seed.
        identity: a number that stands for the corpora.
        shard_ends: rows after each shard, int64 `[shards]`, increasing; the last is the number of rows.
        window: shards that are read together, in random order among them: the next ones follow when all of them were
            seen. None: any row may follow any other.
        weights: float64 `[rows]`, not negative.
    """

    def __init__(
        self,
        seed: int,
        identity: int,
        shard_ends: np.ndarray,
        window: int | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        self.seed, self.identity, self.window = seed, identity, window
        self.shard_ends = shard_ends
        self.size = int(shard_ends[-1])
        self._cumulative = None if weights is None else np.cumsum(weights, dtype=np.float64)
        self._windows: dict[int, _Windows] = {}

    def rows_at(self, positions: np.ndarray) -> np.ndarray:
        """The rows at given places, int64 `[n]`."""
        epochs, offsets = np.divmod(positions, self.size)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._rows(int(epoch), offsets[chosen])
        return rows

    def replacement_row(self, position: int, rng: np.random.Generator) -> int:
        """The row at a random other place of the same epoch and window."""
        epoch, offset = divmod(position, self.size)
        first, end = 0, self.size
        if self.window is not None:
            ends = self._epoch_windows(epoch).ends
            number = int(np.searchsorted(ends, offset, side="right"))
            first, end = int(ends[number - 1]) if number else 0, int(ends[number])
        return int(self.rows_at(np.array([epoch * self.size + rng.integers(first, end)]))[0])

    def _rows(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        if self.window is None:
            slots = feistel_permutation(offsets, self.size, (self.seed, PERMUTATION, self.identity, epoch))
        else:
            slots = self._shuffle_in_windows(epoch, offsets)
        if self._cumulative is None:
            return slots
        levels = (slots + self._phase(epoch)) * (self._cumulative[-1] / self.size)
        return np.minimum(np.searchsorted(self._cumulative, levels, side="right"), self.size - 1)

    def _phase(self, epoch: int) -> float:
        return float(generator(self.seed, SLOTS, self.identity, epoch).random())

    def _shuffle_in_windows(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        windows, ends = self._epoch_windows(epoch), self._slot_ends(epoch)
        starts = np.concatenate([[0], ends[:-1]])
        slots = np.empty_like(offsets)
        numbers = np.searchsorted(windows.ends, offsets, side="right")
        for number in np.unique(numbers):
            chosen, shards = numbers == number, windows.shards[number]
            first = int(windows.ends[number - 1]) if number else 0
            size = int(windows.ends[number]) - first
            key = (self.seed, PERMUTATION, self.identity, epoch, int(number))
            inside = feistel_permutation(offsets[chosen] - first, size, key)
            shard_ends = np.cumsum((ends - starts)[shards])
            at = np.searchsorted(shard_ends, inside, side="right")
            slots[chosen] = starts[shards[at]] + inside - np.concatenate([[0], shard_ends[:-1]])[at]
        return slots

    def _epoch_windows(self, epoch: int) -> _Windows:
        if epoch not in self._windows:
            assert self.window is not None
            ends = self._slot_ends(epoch)
            sizes = np.diff(ends, prepend=0)
            shuffled = generator(self.seed, SHARDS, self.identity, epoch).permutation(len(sizes))
            shards = [shuffled[first : first + self.window] for first in range(0, len(sizes), self.window)]
            self._windows = {epoch: _Windows(shards, np.cumsum([sizes[each].sum() for each in shards]))}
        return self._windows[epoch]

    def _slot_ends(self, epoch: int) -> np.ndarray:
        """Where each shard's places end, were they in the order of the rows, int64 `[shards]`."""
        if self._cumulative is None:
            return self.shard_ends
        totals = np.where(self.shard_ends > 0, self._cumulative[self.shard_ends - 1], 0.0)
        ends = np.ceil(totals * (self.size / self._cumulative[-1]) - self._phase(epoch)).astype(np.int64)
        ends[-1] = self.size
        return ends.clip(0, self.size)


def positions_of_rank(first: int, micro_step: int, rank: int, world_size: int, micro_batch: int) -> np.ndarray:
    """The places one rank reads for one micro-batch of a step, int64 `[micro_batch]`.

    A step covers consecutive places from `first`, so its set of samples depends on the global batch alone, not on how
    that is spread over ranks.
    """
    start = first + (micro_step * world_size + rank) * micro_batch
    return np.arange(start, start + micro_batch)
