"""Vectors on a plane."""

from __future__ import annotations

import numpy as np

from eval.report.charts import scatter_classes

_MOST = 1500


def embedding_map(vectors: np.ndarray, labels: np.ndarray | None, names: list[str], seed: int) -> bytes:
    """Images as points on a plane, near where their vectors are (t-SNE of their first 50 principal components).

    Args:
        vectors: unit vectors `[n, dim]`; of many an even choice is shown.
        labels: classes `[n]`, by which points are colored, or None.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = np.unique(np.linspace(0, len(vectors) - 1, min(_MOST, len(vectors))).astype(int))
    vectors = vectors[rows]
    reduced = PCA(min(50, *vectors.shape), random_state=seed).fit_transform(vectors)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    places = TSNE(2, perplexity=perplexity, init="pca", random_state=seed, max_iter=500).fit_transform(reduced)
    return scatter_classes(places, None if labels is None else labels[rows], names)
