"""Rows of vectors by cluster: k-means learned on a sample, all rows assigned in pieces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from curation.similarity.kmeans import Centroids, nearest, train
from curation.similarity.seeding import spread
from curation.similarity.tiles import Workers
from infra.vectors import Vectors

POINTS = 64  # rows a centroid is trained on at most
_ITERATIONS = 50
_BLOCK = 1 << 14


@dataclass(frozen=True)
class Assigned:
    """The cluster of each row, int32 `[m]`, and its similarity to the centroid, exactly, float64 `[m]`."""

    labels: np.ndarray
    similarity: np.ndarray


def place_within(labels: np.ndarray) -> np.ndarray:
    """How many of the same label come before, for labels that rise; int64 `[m]`."""
    return np.arange(len(labels)) - np.searchsorted(labels, labels)


def learn(
    sample: np.ndarray, count: int, workers: Workers, generator: np.random.Generator, spherical: bool = True
) -> Centroids:
    """Centroids of a sample of rows, float16 `[m, dim]`, m at least `count`."""
    return train(sample, spread(sample, count, workers, generator), _ITERATIONS, workers, spherical)


def assign(vectors: Vectors, rows: np.ndarray, centroids: Centroids, workers: Workers) -> Assigned:
    """The nearest centroid of each of some rows."""
    labels, similarity = np.empty(len(rows), dtype=np.int32), np.empty(len(rows))
    for start in range(0, len(rows), _BLOCK):
        block = vectors.take(rows[start : start + _BLOCK])
        found = nearest(block, centroids, workers)
        labels[start : start + len(block)] = found
        similarity[start : start + len(block)] = centroids.similarity(block, found)
    return Assigned(labels, similarity)
