"""All pairs of 64-bit hashes that differ in few bits, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

_BITS = 64
_PAIRS = 1 << 22  # compared at a time


def pairs_within(hashes: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of places, int64, whose hashes differ in at most `radius` bits, and in how many; some pairs come twice.

    Of radius + 1 pieces of two such hashes one is the same in both (Norouzi et al., Fast Search in Hamming Space with
    Multi-Index Hashing, 2012), so only what shares a piece is compared.

    Args:
        hashes: different ones, uint64 `[n]`.
        radius: less than 64.
    """
    borders = np.linspace(0, _BITS, radius + 2).astype(np.uint64)
    for low, high in pairwise(borders):
        piece = (hashes >> low) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(piece, kind="stable")
        yield from _within_groups(hashes, order, piece[order], radius)


def _within_groups(
    hashes: np.ndarray, order: np.ndarray, piece: np.ndarray, radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Compare each hash with those after it that have the same piece."""
    ends = np.searchsorted(piece, piece, side="right")
    partners = ends - np.arange(len(piece)) - 1
    sums = np.concatenate([[0], np.cumsum(partners)])
    start = 0
    while start < len(piece):
        stop = max(int(np.searchsorted(sums, sums[start] + _PAIRS, side="right")) - 1, start + 1)
        count = partners[start:stop]
        first = np.repeat(np.arange(start, stop), count)
        second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
        a, b = order[first], order[second]
        different = np.bitwise_count(hashes[a] ^ hashes[b])
        near = different <= radius
        yield a[near], b[near], different[near]
        start = stop
