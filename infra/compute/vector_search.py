"""The vectors nearest to others, exactly or by a compressed index. The only module that imports faiss."""

from __future__ import annotations

from typing import Any

import numpy as np

from infra.compute.sharded_array import ShardedArray

_BLOCK = 1 << 15
_POINTS = 64  # training vectors a cell
_CELL = 512  # vectors a cell, about
_PROBES = 32
_CODE = 4  # dimensions that share a byte
_MOST_ON_GPU = 2048  # neighbors
_GPU_BYTES = 1 << 30


def knn_search(queries: np.ndarray, bank: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of a bank with the largest inner products, exactly, on the GPU if there is one.

    Products are made block by block, so beside the vectors and the answer it takes some tens of MB.

    Args:
        queries: float32 `[q, dim]`.
        bank: float32 `[n, dim]`.
        count: how many of them, at most n.

    Returns:
        Products, float32, and rows of the bank, int64, both `[q, count]`, the largest first.
    """
    import faiss

    queries, bank = (np.ascontiguousarray(each, dtype=np.float32) for each in (queries, bank))
    if num_gpus() and count <= _MOST_ON_GPU:
        by, memory = faiss.METRIC_INNER_PRODUCT, _GPU_BYTES
        limits: dict[str, Any] = {"metric": by, "vectorsMemoryLimit": memory, "queriesMemoryLimit": memory}
        return faiss.knn_gpu(faiss.StandardGpuResources(), queries, bank, count, **limits)
    return faiss.knn(queries, bank, count, metric=faiss.METRIC_INNER_PRODUCT)


def num_gpus() -> int:
    """GPUs that faiss sees."""
    import faiss

    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


class IvfPqIndex:
    """Inverted lists of product-quantized vectors (Jégou et al., 2011), on the GPU if there is one.

    Args:
        sample: float16 `[m, dim]` to learn cells and codes from, in random order.
        rows: how many vectors are to be added.
    """

    def __init__(self, sample: np.ndarray, rows: int, seed: int) -> None:
        import faiss

        dim = sample.shape[1]
        cells = max(min(rows // _CELL, len(sample) // 39), 1)
        codes = next(count for count in range(max(dim // _CODE, 1), 0, -1) if dim % count == 0)
        bits = int(min(8, np.log2(max(len(sample) // 39, 2))))
        index: Any = faiss.index_factory(dim, f"IVF{cells},PQ{codes}x{bits}", faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed
        index.nprobe = _PROBES
        if num_gpus() and bits == 8:
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        index.train(sample.astype(np.float32))
        self._index = index

    def add(self, vectors: ShardedArray, rows: np.ndarray) -> None:
        """Add rows; they are found by their places among them."""
        for start in range(0, len(rows), _BLOCK):
            self._index.add(vectors.take(rows[start : start + _BLOCK]).astype(np.float32))

    def candidates(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Places that are likely among the most similar, int64 `[q, count]`; -1 where there are no more."""
        return self._index.search(queries.astype(np.float32), count)[1]


def training_sample_size(rows: int) -> int:
    """How many vectors to learn from."""
    return min(rows, max(_POINTS * (rows // _CELL), 1 << 14))
