"""Linear probe: multinomial logistic regression on frozen features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler


def predict(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, strengths: Sequence[float], held_out: float, seed: int
) -> np.ndarray:
    """Classes of the test features, int64 `[m]`.

    The regularisation is chosen on a held-out, stratified part of the training features, never on the test set; the
    probe is then fitted to all of them.

    Args:
        train: float32 `[n, dim]`.
        labels: int64 `[n]`.
        test: float32 `[m, dim]`.
        strengths: candidate inverse regularisation strengths C.
        held_out: share of the training features that chooses among them.
    """
    best = strengths[0]
    if len(strengths) > 1:
        _, counts = np.unique(labels, return_counts=True)
        stratify = labels if counts.min() >= 2 and len(labels) * held_out >= len(counts) else None
        fit, choose = train_test_split(np.arange(len(labels)), test_size=held_out, random_state=seed, stratify=stratify)
        scores = [_probe(c).fit(train[fit], labels[fit]).score(train[choose], labels[choose]) for c in strengths]
        best = strengths[int(np.argmax(scores))]
    return _probe(best).fit(train, labels).predict(test)


def _probe(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000, tol=1e-3))
