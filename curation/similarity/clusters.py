"""Rows of vectors by cluster: k-means learned on a sample, all rows assigned in pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from curation.similarity.kmeans import Centroids, assign_nearest, train
from curation.similarity.kmeans_plus_plus import kmeans_plus_plus
from curation.similarity.tiles import WorkerPool
from infra.compute.sharded_array import ShardedArray

POINTS = 64  # rows a centroid is trained on at most
_ITERATIONS = 50
_BLOCK = 1 << 14


@dataclass(frozen=True)
class Assignment:
    """The cluster of each row, int32 `[m]`, and its similarity to the centroid, exactly, float64 `[m]`."""

    labels: np.ndarray
    similarity: np.ndarray


def rank_within(labels: np.ndarray) -> np.ndarray:
    """How many of the same label come before, for labels that rise; int64 `[m]`."""
    return np.arange(len(labels)) - np.searchsorted(labels, labels)


def learn(
    sample: np.ndarray, count: int, workers: WorkerPool, generator: np.random.Generator, spherical: bool = True
) -> Centroids:
    """Centroids of a sample of rows, float16 `[m, dim]`, m at least `count`."""
    here = workers.map_locally()
    return train(sample, kmeans_plus_plus(sample, count, here, generator), _ITERATIONS, here, spherical)


def assign(vectors: ShardedArray, rows: np.ndarray, centroids: Centroids, workers: WorkerPool) -> Assignment:
    """The nearest centroid of each of some rows."""
    one = workers.without_cluster()

    def block(start: int) -> tuple[np.ndarray, np.ndarray]:
        some = vectors.take(rows[start : start + _BLOCK])
        labels = assign_nearest(some, centroids, one)
        return labels.astype(np.int32), centroids.similarity(some, labels)

    labels, similarity = np.empty(len(rows), dtype=np.int32), np.empty(len(rows))
    starts = range(0, len(rows), _BLOCK)
    for start, found in zip(starts, workers.map(block, starts), strict=True):
        labels[start : start + _BLOCK], similarity[start : start + _BLOCK] = found
    return Assignment(labels, similarity)
