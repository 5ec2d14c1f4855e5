"""How well the orders of samples mix: Fovea's beside webdataset's shard shuffle with a buffer, and beside chance.

A corpus of 1,000 shards of 1,000 samples, read by one process, where every shard is a world of its own (a site, a day,
a class), which is how web shards come. Counted is how many shards meet in a batch of 256 consecutive samples.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import webdataset as wds

from benchmarks.report import Row, main
from pretrain.data.sample_order import SampleOrder

SHARDS, EACH, BATCH, BATCHES = 1000, 1000, 256, 200
SIZE = SHARDS * EACH


def _batches(order: SampleOrder) -> Iterator[np.ndarray]:
    for first in np.linspace(0, SIZE - BATCH, BATCHES, dtype=np.int64):
        yield order.rows_at(np.arange(first, first + BATCH))


def _webdataset(buffer: int) -> Iterator[np.ndarray]:
    """Shards in random order, then webdataset's buffer of samples."""
    rng = random.Random(0)
    shards = rng.sample(range(SHARDS), SHARDS)
    rows = itertools.chain.from_iterable(range(shard * EACH, (shard + 1) * EACH) for shard in shards)
    mixed = wds.filters._shuffle(rows, buffer, buffer // 2, rng)
    for _ in range(BATCHES):
        yield np.fromiter(itertools.islice(mixed, BATCH), np.int64)
        next(itertools.islice(mixed, SIZE // BATCHES - BATCH - 1, None), None)  # on to the next place


def _shards_in_a_batch(batches: Iterator[np.ndarray]) -> float:
    return float(np.mean([len(np.unique(batch // EACH)) for batch in batches]))


def measure() -> list[Row]:
    ends = np.arange(EACH, SIZE + 1, EACH)
    chance = float(np.mean([len(np.unique(np.random.default_rng(s).integers(0, SHARDS, BATCH))) for s in range(200)]))
    rows = []
    peer = _shards_in_a_batch(_webdataset(5000))
    for name, window in (("full", None), ("windows of 64", 64), ("windows of 256", 256)):
        shards = _shards_in_a_batch(_batches(SampleOrder(0, 1, ends, window)))
        rows.append(Row(f"{name}: shards in a batch, chance", shards, "shards", chance, shards / chance))
        rows.append(Row(f"{name}: webdataset, buffer 5,000", shards, "shards", peer, shards / peer, 1.0))
    return rows


if __name__ == "__main__":
    main("Mixing of 1,000 shards of 1,000 samples in batches of 256", measure)
