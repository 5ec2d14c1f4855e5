"""Retrieval by clusters: keep what shares a cluster with a curated seed (DINOv2, section 3, cluster-based)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from curation.context import Context
from curation.similarity.clusters import assign, rank_within
from curation.steps.assign_clusters import assign_to_clusters
from curation.steps.config import RetrieveClusters


def retrieve_clusters(context: Context, step: RetrieveClusters) -> Mapping[str, Any]:
    """Keep some images of each cluster that enough seed images fall into, drop the rest."""
    verdicts = context.state
    rows = verdicts.kept_rows()
    centroids, mine = assign_to_clusters(context, rows, step.clusters)
    seed = context.seed_embeddings.vectors
    of_seed = assign(seed, np.arange(len(seed)), centroids, context.workers).labels
    sizes, seeds = (np.bincount(each, minlength=len(centroids)) for each in (mine.labels, of_seed))

    order = np.lexsort((verdicts.ranks[rows], -mine.similarity, mine.labels))
    place = rank_within(mine.labels[order])  # in the cluster, the nearest to the centroid first
    wanted = np.flatnonzero((seeds[mine.labels[order]] >= step.min_seeds) & (place < step.quota))
    chosen = order[wanted]
    most = np.lexsort((place[wanted], mine.labels[chosen], -seeds[mine.labels[chosen]]))  # with most seed images first
    kept = np.zeros(len(rows), dtype=bool)
    kept[chosen[most][: step.most]] = True
    context.evidence("members", pa.table({"row": rows, "cluster": mine.labels, "similarity": mine.similarity}))
    context.evidence("seeds", pa.table({"row": np.arange(len(seed)), "cluster": of_seed}))
    verdicts.record(rows[kept], step.kind, "retrieved", -1, mine.similarity[kept])
    verdicts.drop(rows[~kept], step.kind, "not_retrieved", -1, mine.similarity[~kept])
    return {
        "dropped": int((~kept).sum()),
        "clusters": len(centroids),
        "clusters_with_seeds": int((seeds >= step.min_seeds).sum()),
        "clusters_below_quota": int((sizes[seeds >= step.min_seeds] < step.quota).sum()),
    }
