"""Hierarchical k-means with resampling (Vo et al., Automatic Data Curation, arXiv 2405.15613, section 3).

K-means puts most centroids where most points are. Clustering anew only the few members nearest to each centroid, again
and again, spreads the centroids over the space instead; and clusters of clusters spread more evenly still.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from curation.similarity.clusters import POINTS, Assigned, assign, learn
from curation.similarity.exact import dots
from curation.similarity.kmeans import Centroids
from curation.similarity.tiles import Workers
from infra.vectors import Vectors


@dataclass(frozen=True)
class Level:
    """Clusters of one level."""

    centroids: Centroids
    labels: np.ndarray
    """The cluster of each row, or of each cluster of the level below; int32"""


def hierarchy(
    vectors: Vectors,
    rows: np.ndarray,
    sizes: Sequence[int],
    resamplings: int,
    members: Sequence[int],
    workers: Workers,
    generator: np.random.Generator,
    reach: Callable[[float], object] = lambda share: None,
) -> list[Level]:
    """Cluster rows, then the centroids, and so on.

    Args:
        rows: in an order that does not depend on where they lie.
        sizes: clusters of each level, from the finest.
        members: how many nearest members of a cluster a resampling takes, for each level.
    """
    levels: list[Level] = []
    for size, taken in zip(sizes, members, strict=True):
        level = _level(vectors, rows, min(size, len(rows)), resamplings, taken, workers, generator)
        levels.append(level)
        vectors = Vectors([level.centroids.vectors])
        rows = np.arange(len(vectors))
        reach(len(levels) / len(sizes))
    return levels


def _level(
    vectors: Vectors,
    rows: np.ndarray,
    size: int,
    resamplings: int,
    taken: int,
    workers: Workers,
    generator: np.random.Generator,
) -> Level:
    chosen = generator.permutation(len(rows))[: size * POINTS]
    centroids = learn(vectors.take(rows[chosen]), size, workers, generator, spherical=False)
    found = assign(vectors, rows, centroids, workers)
    for _ in range(resamplings):
        some = generator.permutation(_nearest_members(vectors, rows, found, taken))
        if len(some) <= size:
            break
        centroids = learn(vectors.take(rows[some]), size, workers, generator, spherical=False)
        found = assign(vectors, rows, centroids, workers)
    return Level(centroids, found.labels)


def _nearest_members(vectors: Vectors, rows: np.ndarray, found: Assigned, count: int) -> np.ndarray:
    """Places of the members nearest to each centroid."""
    order = np.lexsort((-_nearness(vectors, rows, found), found.labels))
    labels = found.labels[order]
    begins = np.searchsorted(labels, labels)
    return order[np.arange(len(order)) - begins < count]


def _nearness(vectors: Vectors, rows: np.ndarray, found: Assigned) -> np.ndarray:
    """Falls with the distance to the centroid: x·c - |c|²/2 - |x|²/2."""
    lengths = np.empty(len(rows))
    for start in range(0, len(rows), 1 << 14):
        block = vectors.take(rows[start : start + (1 << 14)])
        lengths[start : start + len(block)] = dots(block, block)
    return found.similarity - lengths / 2
