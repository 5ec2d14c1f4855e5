"""SemDeDup (arXiv 2303.09540): of images of one cluster that mean the same, keep one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from curation.context import Context
from curation.similarity.exact import pair_dots, rounding_error, widen
from curation.similarity.nearest import similarities
from curation.steps.assign_clusters import assign_to_clusters
from curation.steps.config import SemDeDup
from infra.compute.sharded_array import ShardedArray

_IMAGES = 1000  # of a cluster, unless told otherwise
_SIDE = 512
_LEVELS = 41  # values of eps of the curve


def semdedup(context: Context, step: SemDeDup) -> Mapping[str, Any]:
    """Drop images more similar than 1 - eps to one before them in their cluster, whether that was dropped or not.

    The highest similarity of each image is kept as evidence, so that any eps can be chosen afterwards.
    """
    verdicts, vectors = context.state, context.vectors
    rows = verdicts.kept_rows()
    centroids, mine = assign_to_clusters(context, rows, step.clusters or max(len(rows) // _IMAGES, 1))
    sign = 1 if step.keep == "hard" else -1
    order = np.lexsort((verdicts.ranks[rows], sign * mine.similarity, mine.labels))
    borders = np.searchsorted(mine.labels[order], np.arange(len(centroids) + 1))
    members = (rows[order[borders[each] : borders[each + 1]]] for each in range(len(centroids)))
    before = np.concatenate(list(context.cores.map(lambda some: some[_most_similar_before(vectors, some)], members)))
    ordered = rows[order]
    scores = similarities(vectors, ordered, before)
    scores[ordered == before] = -np.inf  # the first of each cluster
    context.evidence("scores", pa.table({"row": ordered, "other": before, "similarity": scores.astype(np.float32)}))
    dropped = scores > 1 - step.eps
    verdicts.drop(ordered[dropped], step.kind, "semantic_duplicate", before[dropped], scores[dropped])
    levels = np.round(np.linspace(0, 1, _LEVELS), 4)
    curve = [[float(level), int((scores > 1 - level).sum())] for level in levels]
    return {"dropped": int(dropped.sum()), "clusters": len(centroids), "curve": curve}


def _most_similar_before(vectors: ShardedArray, members: np.ndarray) -> np.ndarray:
    """For each of a cluster's members the place of the most similar one before it, exactly; for the first itself."""
    taken = vectors.take(members)
    wide, doubt = widen(taken), 2 * rounding_error(vectors.dim)
    found = np.zeros(len(members), dtype=np.int64)
    for start in range(0, len(members), _SIDE):
        stop = min(start + _SIDE, len(members))
        tile = wide[start:stop] @ wide[:stop].T
        tile[:, start:][np.triu_indices(stop - start)] = -np.inf
        best = tile.max(axis=1, keepdims=True)
        rows, before = np.nonzero((tile >= best - np.float32(doubt)) & np.isfinite(best))
        similar = pair_dots(taken, taken, rows + start, before)
        order = np.lexsort((before, -similar, rows))
        first = order[np.diff(rows[order], prepend=-1) != 0]
        found[rows[first] + start] = before[first]
    return found
