"""Retrieval by clusters: keep what shares a cluster with a curated seed (DINOv2, section 3, cluster-based)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from curation.context import Context
from curation.similarity import clusters
from curation.steps.config import RetrieveClusters


def retrieve_clusters(context: Context, step: RetrieveClusters) -> Mapping[str, Any]:
    """Keep some images of each cluster that enough seed images fall into, drop the rest."""
    verdicts, vectors, workers = context.verdicts, context.vectors, context.workers
    rows = verdicts.kept()
    count = min(step.clusters, len(rows))
    sample = vectors.take(context.shuffled(rows, clusters.POINTS * count))
    centroids = clusters.learn(sample, count, workers, context.generator())
    mine = clusters.assign(vectors, rows, centroids, workers)
    seed = context.curated.vectors
    seeds = np.bincount(
        clusters.assign(seed, np.arange(len(seed)), centroids, workers).labels, minlength=len(centroids)
    )

    order = np.lexsort((verdicts.ranks[rows], -mine.similarity, mine.labels))
    begins = np.searchsorted(mine.labels[order], np.arange(len(centroids)))
    place = np.arange(len(rows)) - begins[mine.labels[order]]  # within the cluster, the nearest to the centroid first
    wanted = np.flatnonzero((seeds[mine.labels[order]] >= step.min_seeds) & (place < step.quota))
    chosen = order[wanted]
    most = np.lexsort((place[wanted], mine.labels[chosen], -seeds[mine.labels[chosen]]))  # with most seed images first
    kept = np.zeros(len(rows), dtype=bool)
    kept[chosen[most][: step.most]] = True
    verdicts.note(rows[kept], step.kind, "retrieved", -1, mine.similarity[kept])
    verdicts.drop(rows[~kept], step.kind, "not_retrieved", -1, mine.similarity[~kept])
    return {
        "dropped": int((~kept).sum()),
        "clusters": len(centroids),
        "clusters_with_seeds": int((seeds >= step.min_seeds).sum()),
        "clusters_below_quota": int(
            (np.bincount(mine.labels, minlength=len(centroids))[seeds >= step.min_seeds] < step.quota).sum()
        ),
    }
