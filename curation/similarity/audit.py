"""How much an approximate join found, measured against an exact one of a random sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from curation.similarity.exact import pair_dots, rounding_error
from curation.similarity.tiles import WorkerPool
from infra.compute.sharded_array import ShardedArray

_BLOCK = 1 << 13


@dataclass(frozen=True)
class Recall:
    """Of the sampled rows that have a counterpart, how many the join connected with one; and of the pairs of such rows
    how many it connected. A component that fell into parts of more than one image shows in the pairs alone."""

    sampled: int
    with_counterpart: int
    connected: int
    pairs: int
    """Of a sampled row and a counterpart"""
    pairs_connected: int

    def facts(self) -> dict[str, float]:
        """What the manifest tells of it."""
        of_pairs = round(self.pairs_connected / self.pairs, 5) if self.pairs else 1.0
        counts = {"sampled": self.sampled, "with_counterpart": self.with_counterpart}
        return proportion_ci(self.connected, self.with_counterpart) | counts | {"of_pairs": of_pairs}


def proportion_ci(hits: int, trials: int) -> dict[str, float]:
    """A measured proportion with its 95 % interval (Wilson 1927); 1, with an interval of (0, 1), without trials."""
    value, low, high = 1.0, 0.0, 1.0
    if trials:
        from scipy.stats import binomtest

        value = hits / trials
        low, high = binomtest(hits, trials).proportion_ci(method="wilson")
    return {name: round(float(number), 5) for name, number in (("value", value), ("low", low), ("high", high))}


def audit(
    vectors: ShardedArray,
    rows: np.ndarray,
    labels: np.ndarray,
    threshold: float,
    sample: np.ndarray,
    workers: WorkerPool,
) -> Recall:
    """Compare some places of `rows` with all of them.

    Args:
        labels: the component that the join gave each of `rows`.
        sample: places in `rows`, int64, rising.
    """
    tiles, wanted = workers.tiles, vectors.take(rows[sample])
    held, doubt = tiles.load(wanted), rounding_error(vectors.dim)

    def block(start: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        others = vectors.take(rows[start : start + _BLOCK])
        a, b, scores = tiles.find_above(held, tiles.load(others), threshold - doubt)
        near = sample[a] != b + start
        close = np.flatnonzero(near & (scores < threshold + doubt))
        near[close] = pair_dots(wanted, others, a[close], b[close]) >= threshold
        a, b = a[near], b[near] + start
        met = labels[sample[a]] == labels[b]
        return np.unique(a), np.unique(a[met]), len(a), int(met.sum())

    found = list(workers.map(block, range(0, len(rows), _BLOCK)))
    there, met, pairs, connected = zip(*found, strict=True)
    rows_there, rows_met = (len(np.unique(np.concatenate(each))) for each in (there, met))
    return Recall(len(sample), rows_there, rows_met, sum(pairs), sum(connected))
