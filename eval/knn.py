"""Weighted k-nearest-neighbour classification, the protocol of DINO (arXiv 2104.14294, section 4.1)."""

from __future__ import annotations

import numpy as np
import torch

_BLOCK = 1024  # queries at a time: bounds memory at block * bank similarities


def predict(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, classes: int, k: int, temperature: float
) -> np.ndarray:
    """Classes of the queries, int64 `[q]`.

    Args:
        bank: labelled vectors of unit length, float32 `[n, dim]`.
        labels: their classes, int64 `[n]`.
        queries: vectors of unit length, float32 `[q, dim]`.
        classes: number of classes.
        k: neighbours that vote, at most n.
        temperature: a neighbour's vote weighs exp(cosine / temperature).
    """
    memory, marks = torch.from_numpy(bank), torch.from_numpy(labels)
    predictions = []
    for block in torch.from_numpy(queries).split(_BLOCK):
        similarity, nearest = (block @ memory.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(block), classes)
        votes.scatter_add_(1, marks[nearest], ((similarity - similarity[:, :1]) / temperature).exp())
        predictions.append(votes.argmax(1))
    return torch.cat(predictions).numpy()
