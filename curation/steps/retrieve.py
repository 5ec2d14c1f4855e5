"""Retrieval: keep what is near a curated seed (DINOv2, section 3, sample-based)."""

from __future__ import annotations

import numpy as np

from curation.config import Retrieve
from curation.neighbours import search
from curation.verdicts import Verdicts


def retrieve(verdicts: Verdicts, step: Retrieve, vectors: np.ndarray, seed: np.ndarray, seed_keys: np.ndarray) -> None:
    """Keep the nearest kept images of each seed image, drop the rest.

    Args:
        vectors: unit vectors of all rows, float32 `[n, dim]`.
        seed: unit vectors of the seed, float32 `[m, dim]`.
        seed_keys: their keys, `[m]`.
    """
    rows = verdicts.kept()
    similarity, found = search(vectors[rows], seed, step.neighbours)
    retrieved = np.zeros(len(rows), dtype=bool)
    retrieved[found[similarity >= step.min_similarity]] = True
    best, nearest = search(seed, vectors[rows], 1)
    winners, scores = seed_keys[nearest[:, 0]], best[:, 0]
    lost = ~retrieved
    verdicts.note(rows[retrieved], step.kind, "retrieved", winners[retrieved], scores[retrieved])
    verdicts.drop(rows[lost], step.kind, "not_retrieved", winners[lost], scores[lost])
