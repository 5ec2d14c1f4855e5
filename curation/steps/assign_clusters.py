"""The clusters of some rows of the corpus, as several steps need them."""

from __future__ import annotations

import numpy as np

from curation.context import Context
from curation.similarity import clusters
from curation.similarity.clusters import Assignment
from curation.similarity.kmeans import Centroids


def assign_to_clusters(context: Context, rows: np.ndarray, count: int) -> tuple[Centroids, Assignment]:
    """At most `count` clusters learned from a sample of the rows, and that of each row."""
    count = min(count, len(rows))
    sample = context.vectors.take(context.shuffled(rows, clusters.POINTS * count))
    centroids = clusters.learn(sample, count, context.workers, context.generator())
    return centroids, clusters.assign(context.vectors, rows, centroids, context.workers)
