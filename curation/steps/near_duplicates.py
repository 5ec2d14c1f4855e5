"""Near-duplicates: connected components of the similarity graph, one representative each (DINOv2, appendix A)."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from curation.config import NearDuplicates
from curation.neighbours import search
from curation.verdicts import Verdicts


def near_duplicates(verdicts: Verdicts, step: NearDuplicates, vectors: np.ndarray, pixels: np.ndarray) -> None:
    """Keep one image of each component.

    Args:
        vectors: unit vectors of all rows, float32 `[n, dim]`.
        pixels: width times height of all rows, int64 `[n]`.
    """
    rows = verdicts.kept()
    component = components(vectors[rows], step.threshold, step.neighbours)
    order = _preference(verdicts, rows, pixels, step.representative)
    _, first, group = np.unique(component[order], return_index=True, return_inverse=True)
    winners = np.empty(len(rows), dtype=np.int64)
    winners[order] = order[first][group]
    losers = np.flatnonzero(winners != np.arange(len(rows)))
    scores = (vectors[rows[losers]] * vectors[rows[winners[losers]]]).sum(1)
    verdicts.drop(rows[losers], step.kind, "near_duplicate", verdicts.keys[rows[winners[losers]]], scores)
    np.add.at(verdicts.weight, rows[winners[losers]], verdicts.weight[rows[losers]])
    verdicts.cluster[rows] = rows[winners]


def components(vectors: np.ndarray, threshold: float, neighbours: int) -> np.ndarray:
    """Connected component of each vector, int32 `[n]`, joining pairs of a cosine of at least `threshold`."""
    n = len(vectors)
    similarities, found = search(vectors, vectors, neighbours + 1)
    source, place = np.nonzero(similarities >= threshold)
    target = found[source, place]
    graph = coo_array((np.ones(len(source), dtype=bool), (source, target)), shape=(n, n))
    return connected_components(graph, directed=False)[1]


def _preference(verdicts: Verdicts, rows: np.ndarray, pixels: np.ndarray, policy: str) -> np.ndarray:
    """Places in `rows`, the image to keep of any group first; ties go to the key that comes first."""
    keys = verdicts.keys[rows].astype(str)
    if policy == "resolution":
        return np.lexsort((keys, -pixels[rows]))
    return np.argsort(keys, kind="stable")
