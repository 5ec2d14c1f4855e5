"""Nearest neighbours by inner product. The only module that imports faiss."""

from __future__ import annotations

from typing import Any

import numpy as np


def search(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar rows of `bank` for each query, exactly; on the GPU if there is one.

    Args:
        bank: float32 `[n, dim]`.
        queries: float32 `[q, dim]`.
        k: at most n.

    Returns:
        similarities float32 `[q, k]`, falling, and rows int64 `[q, k]`.
    """
    import faiss

    index: Any = faiss.IndexFlatIP(bank.shape[1])
    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(np.ascontiguousarray(bank))
    similarities, rows = index.search(np.ascontiguousarray(queries), min(k, len(bank)))
    return similarities, rows
