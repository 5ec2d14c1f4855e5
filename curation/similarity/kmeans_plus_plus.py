"""Where k-means starts: points drawn far from one another (k-means++, Arthur and Vassilvitskii 2007)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from curation.similarity.exact import round_to_float16
from curation.similarity.tiles import WorkerPool

_ROUNDS = 32
_BLOCK = 1 << 12


def kmeans_plus_plus(sample: np.ndarray, k: int, workers: WorkerPool, generator: np.random.Generator) -> np.ndarray:
    """Rows of a sample, float16 `[m, dim]`, each drawn by its squared distance to those before; int64 `[k]`.

    Of two that are drawn the better stays: the one that brings the others nearer (greedy k-means++). Beyond 32, as many
    at a time as make 32 rounds, each round's without regard to one another: then it is a matter of dense products.
    """
    points = _Points(round_to_float16(sample), workers)
    chosen = generator.integers(0, len(sample), 1)
    points.update_distances(chosen)
    while len(chosen) < k:
        count = min(-(-k // _ROUNDS), k - len(chosen))
        rivals = np.resize(_draw(points.nearest, 2 * count, chosen, generator), 2 * count)
        gains = points.potential_gains(rivals)
        fresh = np.unique(np.where(gains[:count] >= gains[count:], rivals[:count], rivals[count:]))
        points.update_distances(fresh)
        chosen = np.concatenate([chosen, fresh])
    return chosen


@dataclass
class _Points:
    """Rows of whole numbers, whose squared distances are exact in float32: no draw depends on how they are computed."""

    rows: np.ndarray
    workers: WorkerPool
    nearest: np.ndarray = field(init=False)
    """Squared distance of each row to the nearest that was chosen, float32 `[m]`"""

    def __post_init__(self) -> None:
        self._lengths = np.einsum("ij,ij->i", self.rows, self.rows)
        self.nearest = np.full(len(self.rows), np.inf, dtype=np.float32)

    def update_distances(self, chosen: np.ndarray) -> None:
        """Note that some rows were chosen."""
        parts = self._each(lambda some: np.minimum(self.nearest[some], self._distances(some, chosen).min(axis=1)))
        self.nearest = np.concatenate(parts)

    def potential_gains(self, rivals: np.ndarray) -> np.ndarray:
        """How much nearer all rows would come to what is chosen with each of some rows, float64 `[rivals]`."""
        return np.stack(self._each(lambda some: self._gain(some, rivals))).sum(axis=0, dtype=np.float64)

    def _gain(self, some: slice, rivals: np.ndarray) -> np.ndarray:
        nearer = self._distances(some, rivals)
        np.subtract(self.nearest[some, None], nearer, out=nearer)
        return np.maximum(nearer, 0, out=nearer).sum(axis=0)

    def _distances(self, some: slice, others: np.ndarray) -> np.ndarray:
        found = self.rows[some] @ self.rows[others].T
        found *= -2
        found += self._lengths[some, None]
        found += self._lengths[others]
        return found

    def _each(self, work: Callable[[slice], np.ndarray]) -> list[np.ndarray]:
        starts = range(0, len(self.rows), _BLOCK)
        return list(self.workers.map(lambda start: work(slice(start, start + _BLOCK)), starts))


def _draw(weights: np.ndarray, count: int, taken: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Rows as likely as their weights say; where no weight is left, rows not yet taken."""
    sums = np.cumsum(weights, dtype=np.float64)
    if sums[-1] <= 0:
        return np.setdiff1d(np.arange(len(weights)), taken)[:count]
    return np.searchsorted(sums, generator.random(count) * sums[-1], side="right").clip(0, len(weights) - 1)
