"""Retrieval: keep what is near a curated seed (DINOv2, section 3, sample-based)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from curation.context import Context
from curation.similarity.audit import proportion_ci
from curation.similarity.nearest import argmax_above, k_nearest, rank_candidates
from curation.steps.config import Retrieve
from infra.compute.vector_search import IvfPqIndex, training_sample_size

_EXACT_WORK = 4e11  # products: seed images times images times dimensions
_WIDER = 8  # times as many candidates are taken from the index as are wanted
_SPARE = 4  # times as many neighbors are looked at where each seed image is to have its own
_BLOCK = 1 << 15
_INDEXED = 10_000  # images from which an index can be learned


def retrieve(context: Context, step: Retrieve) -> Mapping[str, Any]:
    """Keep the nearest kept images of each seed image, drop the rest."""
    verdicts, seed = context.state, context.seed_embeddings
    rows = verdicts.sort_by_key(verdicts.kept_rows())  # of equally similar images the first key counts
    wanted = step.k * (_SPARE if step.without_replacement else 1)
    places, scores, told = _find_neighbors(context, step, rows, wanted)
    near = (scores >= step.min_similarity) & (places >= 0)
    chosen = _own(places, scores, near, step.k) if step.without_replacement else near
    asker, column = np.nonzero(chosen)
    found, score = places[asker, column], scores[asker, column]
    order = np.lexsort((asker, -score, found))
    first = order[np.diff(found[order], prepend=-1) != 0]
    retrieved = rows[found[first]]
    verdicts.record(retrieved, step.kind, "retrieved", asker[first], score[first], seed.number)
    lost = np.setdiff1d(rows, retrieved)
    verdicts.drop(lost, step.kind, "not_retrieved", -1, np.nan)
    if _comparable_rows(context, rows):  # say what they are most like
        best = argmax_above(context.vectors, lost, seed.vectors, -np.inf, context.workers)
        verdicts.record(best.rows, step.kind, "not_retrieved", best.others, best.scores, seed.number)
    return {
        "dropped": len(lost),
        "seed_images": len(seed.vectors),
        "neighbors": len(found),
        "collisions": len(found) - len(retrieved),
        "missing": step.k * len(seed.vectors) - len(found),
        **told,
    }


def _find_neighbors(
    context: Context, step: Retrieve, rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Places in `rows` near each seed image, int64 `[seed, k]`, their similarities, and what the manifest tells."""
    vectors = context.vectors
    if step.index == "exact" or len(rows) < _INDEXED or (step.index == "auto" and _comparable_rows(context, rows)):
        return *_search_blocks(context, lambda queries: k_nearest(queries, vectors, rows, k, context.workers)), {}
    index = IvfPqIndex(vectors.take(context.shuffled(rows, training_sample_size(len(rows)))), len(rows), context.seed)
    index.add(vectors, rows)

    def search(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        candidates = index.candidates(queries, min(_WIDER * k, len(rows)))
        return rank_candidates(queries, vectors, rows, candidates, k)

    places, scores = _search_blocks(context, search)
    return places, scores, {"recall": _audit(context, step, rows, places)} if step.recall_audit_images else {}


def _comparable_rows(context: Context, rows: np.ndarray) -> bool:
    """Whether comparing all with all seed images takes little."""
    return len(rows) * len(context.seed_embeddings.vectors) * context.vectors.dim <= _EXACT_WORK


def _search_blocks(context: Context, search: Any) -> tuple[np.ndarray, np.ndarray]:
    seed = context.seed_embeddings.vectors
    starts = range(0, len(seed), _BLOCK)
    parts = [search(seed.take(np.arange(start, min(start + _BLOCK, len(seed))))) for start in starts]
    places, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
    return places, scores


def _audit(context: Context, step: Retrieve, rows: np.ndarray, places: np.ndarray) -> dict[str, float]:
    """The share of the exact neighbors that the index found, of some seed images."""
    seed = context.seed_embeddings.vectors
    generator = context.generator()
    asked = np.sort(generator.permutation(len(seed))[: step.recall_audit_images])
    exact, _ = k_nearest(seed.take(asked), context.vectors, rows, places.shape[1], context.workers)
    hits = sum(len(np.intersect1d(found, true)) for found, true in zip(places[asked], exact, strict=True))
    return proportion_ci(hits, exact.size)


def _own(places: np.ndarray, scores: np.ndarray, near: np.ndarray, k: int) -> np.ndarray:
    """Which neighbors each seed image gets if no image may serve two, bool like `index_in`: the most similar first."""
    asker, column = np.nonzero(near)
    order = np.lexsort((column, asker, -scores[asker, column]))
    chosen = np.zeros_like(near)
    got = np.zeros(len(places), dtype=np.int64)
    taken: set[int] = set()
    for at in order.tolist():
        who, place = int(asker[at]), int(places[asker[at], column[at]])
        if got[who] < k and place not in taken:
            taken.add(place)
            got[who] += 1
            chosen[who, column[at]] = True
    return chosen
