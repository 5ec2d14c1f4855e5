"""Where k-means starts: points drawn far from one another (k-means++, Arthur and Vassilvitskii 2007)."""

from __future__ import annotations

import numpy as np

from curation.similarity.exact import dots, widened
from curation.similarity.tiles import Workers

_ROUNDS = 64
_BLOCK = 1 << 12


def spread(sample: np.ndarray, k: int, workers: Workers, generator: np.random.Generator) -> np.ndarray:
    """Rows of a sample, float16 `[m, dim]`, each drawn by its squared distance to those before; int64 `[k]`.

    Beyond 64, as many at a time as make 64 rounds, each round's without regard to one another: then it is a matter of
    dense products. All distances are exact, so the draw does not depend on how they are computed.
    """
    lengths = dots(sample, sample)
    chosen = generator.integers(0, len(sample), 1)
    nearest = np.full(len(sample), np.inf)
    fresh = chosen
    while len(chosen) < k:
        nearest = np.minimum(nearest, _distances(sample, lengths, fresh, workers))
        nearest[fresh] = 0.0
        count = min(-(-k // _ROUNDS), k - len(chosen))
        fresh = _drawn(nearest, count, chosen, generator)
        chosen = np.concatenate([chosen, fresh])
    return chosen


def _distances(sample: np.ndarray, lengths: np.ndarray, others: np.ndarray, workers: Workers) -> np.ndarray:
    """Squared distance of each row to the nearest of some others, float64 `[m]`."""
    theirs = widened(sample[others]).astype(np.float64)

    def block(start: int) -> np.ndarray:
        mine = widened(sample[start : start + _BLOCK]).astype(np.float64)
        return (lengths[others] - 2 * (mine @ theirs.T)).min(axis=1)

    return np.maximum(np.concatenate(list(workers.map(block, range(0, len(sample), _BLOCK)))) + lengths, 0)


def _drawn(weights: np.ndarray, count: int, taken: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """At most `count` different rows, as likely as their weights say; where no weight is left, rows not yet taken."""
    sums = np.cumsum(weights)
    if sums[-1] <= 0:
        return np.setdiff1d(np.arange(len(weights)), taken)[:count]
    return np.unique(np.searchsorted(sums, generator.random(count) * sums[-1], side="right").clip(0, len(weights) - 1))
