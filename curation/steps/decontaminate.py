"""Decontamination: drop what an evaluation set already shows (DINOv2, appendix A; direct hits)."""

from __future__ import annotations

import numpy as np

from curation.config import Decontaminate
from curation.neighbours import search
from curation.verdicts import Verdicts


def decontaminate(
    verdicts: Verdicts, step: Decontaminate, vectors: np.ndarray, evaluation: np.ndarray, evaluation_keys: np.ndarray
) -> None:
    """Drop kept images whose nearest evaluation image is at least as similar as the threshold.

    Args:
        vectors: unit vectors of all rows, float32 `[n, dim]`.
        evaluation: unit vectors of the evaluation images, float32 `[m, dim]`.
        evaluation_keys: their keys, `[m]`.
    """
    rows = verdicts.kept()
    similarity, nearest = search(evaluation, vectors[rows], 1)
    leaks = similarity[:, 0] >= step.threshold
    verdicts.drop(rows[leaks], step.kind, "leak", evaluation_keys[nearest[leaks, 0]], similarity[leaks, 0])
