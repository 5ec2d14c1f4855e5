"""SemDeDup (arXiv 2303.09540): of images of one cluster that mean the same, keep one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from curation.context import Context
from curation.similarity import clusters
from curation.similarity.exact import widened
from curation.steps.config import SemDeDup
from curation.steps.near_duplicates import similarities

_IMAGES = 1000  # of a cluster, unless told otherwise
_SIDE = 512
_LEVELS = 41  # values of eps of the curve


def semdedup(context: Context, step: SemDeDup) -> Mapping[str, Any]:
    """Drop images more similar than 1 - eps to one before them in their cluster, whether that was dropped or not.

    The highest similarity of each image is kept as evidence, so that any eps can be chosen afterwards.
    """
    verdicts, vectors, workers = context.verdicts, context.vectors, context.workers
    rows = verdicts.kept()
    count = min(step.clusters or max(len(rows) // _IMAGES, 1), len(rows))
    sample = vectors.take(context.shuffled(rows, clusters.POINTS * count))
    centroids = clusters.learn(sample, count, workers, context.generator())
    mine = clusters.assign(vectors, rows, centroids, workers)
    sign = 1 if step.keep == "hard" else -1
    order = np.lexsort((verdicts.ranks[rows], sign * mine.similarity, mine.labels))
    borders = np.searchsorted(mine.labels[order], np.arange(len(centroids) + 1))
    members = (rows[order[borders[each] : borders[each + 1]]] for each in range(len(centroids)))
    before = np.concatenate(list(workers.map(lambda some: some[_most_similar_before(vectors, some)], members)))
    ordered = rows[order]
    scores = similarities(vectors, ordered, before)
    scores[ordered == before] = -np.inf  # the first of each cluster
    context.evidence("scores", pa.table({"row": ordered, "other": before, "similarity": scores.astype(np.float32)}))
    dropped = scores > 1 - step.eps
    verdicts.drop(ordered[dropped], step.kind, "same_meaning", before[dropped], scores[dropped])
    levels = np.round(np.linspace(0, 1, _LEVELS), 4)
    curve = [[float(level), int((scores > 1 - level).sum())] for level in levels]
    return {"dropped": int(dropped.sum()), "clusters": len(centroids), "curve": curve}


def _most_similar_before(vectors: Any, members: np.ndarray) -> np.ndarray:
    """For each of a cluster's members the place of the most similar one before it; for the first itself."""
    wide = widened(vectors.take(members))
    found = np.zeros(len(members), dtype=np.int64)
    for start in range(0, len(members), _SIDE):
        stop = min(start + _SIDE, len(members))
        tile = wide[start:stop] @ wide[:stop].T
        tile[np.triu_indices(stop - start, 0, stop)[0], np.triu_indices(stop - start, start, stop)[1]] = -np.inf
        found[start:stop] = tile.argmax(axis=1)
    return found
