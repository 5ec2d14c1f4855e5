"""Hierarchical k-means with resampling (Vo et al., Automatic Data Curation, arXiv 2405.15613, section 3).

K-means puts most centroids where most points are. Clustering anew only the few members nearest to each centroid, again
and again, spreads the centroids over the space instead; and clusters of clusters spread more evenly still.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from curation.similarity.clusters import POINTS, Assignment, assign, learn, rank_within
from curation.similarity.kmeans import Centroids
from curation.similarity.nearest import similarities
from curation.similarity.tiles import WorkerPool
from infra.compute.sharded_array import ShardedArray


@dataclass(frozen=True)
class Level:
    """Clusters of one level."""

    centroids: Centroids
    labels: np.ndarray
    """The cluster of each row, or of each cluster of the level below; int32"""


def hierarchy(
    vectors: ShardedArray,
    rows: np.ndarray,
    sizes: Sequence[int],
    resamplings: int,
    members: Sequence[int],
    workers: WorkerPool,
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
        vectors = ShardedArray([level.centroids.vectors])
        rows = np.arange(len(vectors))
        reach(len(levels) / len(sizes))
    return levels


def _level(
    vectors: ShardedArray,
    rows: np.ndarray,
    size: int,
    resamplings: int,
    taken: int,
    workers: WorkerPool,
    generator: np.random.Generator,
) -> Level:
    chosen = generator.permutation(len(rows))[: size * POINTS]
    centroids = learn(vectors.take(rows[chosen]), size, workers, generator, spherical=False)
    found, lengths = assign(vectors, rows, centroids, workers), similarities(vectors, rows, rows)
    for _ in range(resamplings):
        some = generator.permutation(_nearest_members(found, lengths, taken))
        if len(some) <= size:
            break
        centroids = learn(vectors.take(rows[some]), size, workers, generator, spherical=False)
        found = assign(vectors, rows, centroids, workers)
    return Level(centroids, found.labels)


def _nearest_members(found: Assignment, lengths: np.ndarray, count: int) -> np.ndarray:
    """Places of the members nearest to each centroid: where x·c - |c|²/2 - |x|²/2 is highest."""
    order = np.lexsort((lengths / 2 - found.similarity, found.labels))
    return order[rank_within(found.labels[order]) < count]
