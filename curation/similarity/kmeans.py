"""K-means whose every decision is exact: the centroids depend on the vectors alone, not on how they are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from curation.similarity.exact import dots, is_zero, pair_dots, rounding_error, widen
from curation.similarity.tiles import WorkerPool

_BLOCK = 1024  # rows of a tile
_LARGEST_TILE = 1 << 22  # similarities
_SETTLED = 1e-3  # share of rows that may still change their centroid


@dataclass(frozen=True)
class Centroids:
    """Float16 `[k, dim]`. With `biases`, float64 `[k]`, the nearest by Euclidean distance has the highest x·c + bias;
    without, centroids are unit vectors and the nearest is the most similar one."""

    vectors: np.ndarray
    biases: np.ndarray | None = None

    @classmethod
    def from_vectors(cls, means: np.ndarray, spherical: bool) -> Centroids:
        """From means of members, float64 `[k, dim]`."""
        if spherical:
            norms = np.sqrt((means**2).sum(1, keepdims=True))
            return cls((means / np.maximum(norms, 1e-12)).astype(np.float16))
        vectors = means.astype(np.float16)
        return cls(vectors, -0.5 * dots(vectors, vectors))

    def __len__(self) -> int:
        return len(self.vectors)

    def select(self, chosen: np.ndarray) -> Centroids:
        return Centroids(self.vectors[chosen], None if self.biases is None else self.biases[chosen])

    @property
    def block(self) -> int:
        """How many rows to compare with them at a time."""
        return int(np.clip(_LARGEST_TILE // max(len(self), 1), 16, _BLOCK))

    def resident(self, workers: WorkerPool) -> Any:
        wide = widen(self.vectors)
        if self.biases is not None:
            wide = np.column_stack([wide, self.biases.astype(np.float32)])
        return workers.tiles.load(wide)

    def load(self, rows: np.ndarray, workers: WorkerPool) -> Any:
        """Rows as they are compared with `held`."""
        wide = widen(rows)
        if self.biases is not None:
            wide = np.column_stack([wide, np.ones(len(rows), dtype=np.float32)])
        return workers.tiles.load(wide)

    def similarity(self, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Of each row to the centroid of its label, exactly, with the bias if there are any; float64 `[m]`."""
        return self.similarities(rows, np.arange(len(rows)), labels)

    def similarities(self, rows: np.ndarray, places: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The same of pairs of a row and a label; float64 `[pairs]`."""
        found = pair_dots(rows, self.vectors, places, labels)
        return found if self.biases is None else found + self.biases[labels]

    @property
    def rounding_error(self) -> float:
        return rounding_error(self.vectors.shape[1] + 1)


def assign_nearest(rows: np.ndarray, centroids: Centroids, workers: WorkerPool) -> np.ndarray:
    """The nearest centroid of each row, int64 `[m]`; of equally near ones the first.

    Args:
        rows: float16 `[m, dim]`.
    """
    held, step = centroids.resident(workers), centroids.block
    blocks = (rows[start : start + step] for start in range(0, len(rows), step))
    labels = list(workers.map(lambda block: _assign_block(block, centroids, held, workers), blocks))
    return np.concatenate(labels) if labels else np.empty(0, dtype=np.int64)


def _assign_block(block: np.ndarray, centroids: Centroids, held: Any, workers: WorkerPool) -> np.ndarray:
    nothing = is_zero(block)
    found = np.full(len(block), 0 if centroids.biases is None else int(np.argmax(centroids.biases)))
    found[~nothing] = _most_similar(block[~nothing], centroids, held, workers)
    return found


def _most_similar(block: np.ndarray, centroids: Centroids, held: Any, workers: WorkerPool) -> np.ndarray:
    rows, labels, _ = workers.tiles.find_near_best(centroids.load(block, workers), held, 2 * centroids.rounding_error)
    if len(rows) == len(block):
        return labels
    similar = centroids.similarities(block, rows, labels)  # some rows have several candidates
    order = np.lexsort((labels, -similar, rows))
    first = np.searchsorted(rows[order], np.arange(len(block)))
    return labels[order][first]


def train(
    sample: np.ndarray, start: np.ndarray, iterations: int, workers: WorkerPool, spherical: bool = True
) -> Centroids:
    """Lloyd's iterations from some rows of a sample, until next to no row changes its centroid.

    Args:
        sample: float16 `[m, dim]`.
        start: the rows, int64 `[k]`.
    """
    centroids = Centroids.from_vectors(sample[start].astype(np.float64), spherical)
    labels = assign_nearest(sample, centroids, workers)
    for number in range(iterations):
        moved = _update_centroids(sample, labels, centroids, spherical)
        if number == iterations - 1:
            return moved
        before, labels = labels, _replace_empty(sample, labels, centroids, moved, workers)
        centroids = moved
        if (labels != before).mean() <= _SETTLED:
            break
    return centroids


def _update_centroids(sample: np.ndarray, labels: np.ndarray, centroids: Centroids, spherical: bool) -> Centroids:
    """Centroids in the middle of their members."""
    means, counts = sum_by_label(sample, labels, len(centroids)), np.bincount(labels, minlength=len(centroids))
    means /= np.maximum(counts, 1)[:, None]
    means[counts == 0] = _find_outliers(sample, labels, centroids, int((counts == 0).sum()))
    return Centroids.from_vectors(means, spherical)


def _replace_empty(
    sample: np.ndarray, labels: np.ndarray, before: Centroids, after: Centroids, workers: WorkerPool
) -> np.ndarray:
    """What `knn_search` says after the centroids have moved from where it gave the labels; int64 `[m]`.

    A row whose own centroid has come no less near can only change to one of those that moved, since none of the others
    was nearer. In late iterations these are few.
    """
    moved = (before.vectors != after.vectors).any(axis=1)
    mine = np.flatnonzero(moved[labels])
    was, own = (each.similarity(sample[mine], labels[mine]) for each in (before, after))
    lost = np.zeros(len(sample), dtype=bool)
    lost[mine[own < was]] = True
    labels = labels.copy()
    labels[lost] = assign_nearest(sample[lost], after, workers)
    held = np.flatnonzero(~lost)
    labels[held] = _reassign_if_nearer(sample[held], labels[held], after, np.flatnonzero(moved), workers)
    return labels


def _reassign_if_nearer(
    rows: np.ndarray, labels: np.ndarray, centroids: Centroids, others: np.ndarray, workers: WorkerPool
) -> np.ndarray:
    """The nearest of some centroids where it is nearer than that of the label, which it is else; int64 `[m]`."""
    few, step = centroids.select(others), centroids.block
    held, doubt = few.resident(workers), 2 * centroids.rounding_error

    def block(start: int) -> np.ndarray:
        some = slice(start, start + step)
        own = centroids.similarity(rows[some], labels[some])
        cut = (own - doubt).astype(np.float32)[:, None]
        row, near, _ = workers.tiles.find_above(few.load(rows[some], workers), held, cut)
        near = others[near]
        similar = centroids.similarities(rows[some], row, near)
        better = (similar > own[row]) | ((similar == own[row]) & (near < labels[some][row]))
        row, near, similar = row[better], near[better], similar[better]
        order = np.lexsort((-near, similar, row))
        found = labels[some].copy()
        found[row[order]] = near[order]  # of several for a row the last stays
        return found

    if not len(others) or not len(rows):
        return labels
    return np.concatenate(list(workers.map(block, range(0, len(rows), step))))


def sum_by_label(rows: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Sum of the rows of each label, float64 `[k, dim]`, exactly: see `exact.dots`."""
    found = np.zeros((k, rows.shape[1]))
    for start in range(0, len(rows), 1 << 16):
        part = labels[start : start + (1 << 16)]
        order = np.argsort(part, kind="stable")
        there, first = np.unique(part[order], return_index=True)
        found[there] += np.add.reduceat(rows[start : start + (1 << 16)][order].astype(np.float64), first, axis=0)
    return found


def _find_outliers(sample: np.ndarray, labels: np.ndarray, centroids: Centroids, count: int) -> np.ndarray:
    """The rows least like their centroid, for centroids that have lost all of theirs, float64 `[count, dim]`."""
    if not count:
        return np.empty((0, sample.shape[1]))
    similar = centroids.similarity(sample, labels)
    if centroids.biases is not None:  # to falling distance
        similar = similar - 0.5 * dots(sample, sample)
    return sample[np.argsort(similar, kind="stable")[:count]].astype(np.float64)
