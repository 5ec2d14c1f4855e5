"""Hierarchical k-means as the paper's authors describe it, with scikit-learn's k-means, beside Fovea's."""

from __future__ import annotations

import numpy as np

LEVELS, MEMBERS, RESAMPLINGS = (1000, 200), (10, 3), 10


def by_scikit_learn(vectors: np.ndarray) -> list[np.ndarray]:
    """Each clustering from k-means++, 50 of Lloyd's iterations; centroids of each level, float64."""
    from sklearn.cluster import KMeans

    points, levels = vectors.astype(np.float32), []
    for size, members in zip(LEVELS, MEMBERS, strict=True):
        some = points
        for number in range(RESAMPLINGS + 1):
            fitted = KMeans(size, n_init=1, max_iter=50, tol=0, random_state=number).fit(some)
            distances = fitted.transform(points)
            labels = distances.argmin(1)
            order = np.lexsort((distances.min(1), labels))
            place = np.arange(len(order)) - np.searchsorted(labels[order], labels[order])
            centroids, some = fitted.cluster_centers_, points[order[place < members]]
        levels.append(centroids)
        points = centroids.astype(np.float32)
    return levels


def by_fovea(vectors: np.ndarray) -> list[np.ndarray]:
    """Fovea's, with the same settings."""
    from curation.similarity.hierarchy import hierarchy
    from curation.similarity.tiles import CpuTiles, WorkerPool
    from infra.compute.sharded_array import ShardedArray

    levels = hierarchy(
        ShardedArray([vectors]),
        np.arange(len(vectors)),
        LEVELS,
        RESAMPLINGS,
        MEMBERS,
        WorkerPool(CpuTiles(), 1),
        np.random.default_rng(0),
    )
    return [level.centroids.vectors.astype(np.float64) for level in levels]


def objective(vectors: np.ndarray, levels: list[np.ndarray]) -> float:
    """Mean squared distance of the vectors to the centroids of the finest level."""
    points = vectors.astype(np.float64)
    total = 0.0
    for start in range(0, len(points), 4096):
        block = points[start : start + 4096]
        squared = (block**2).sum(1)[:, None] + (levels[0] ** 2).sum(1) - 2 * block @ levels[0].T
        total += float(squared.min(1).sum())
    return total / len(points)


def spacing(levels: list[np.ndarray]) -> float:
    """Mean squared distance between a centroid of the finest level and the nearest other: how evenly they spread."""
    points = levels[0]
    squared = (points**2).sum(1)[:, None] + (points**2).sum(1) - 2 * points @ points.T
    np.fill_diagonal(squared, np.inf)
    return float(squared.min(1).mean())
