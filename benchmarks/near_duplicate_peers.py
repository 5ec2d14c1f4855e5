"""Ways to find all near-duplicates of many vectors: Fovea's, and those that others would use. One thread each."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

if TYPE_CHECKING:
    from curation.similarity.cells import Cells
    from curation.similarity.tiles import WorkerPool
    from infra.compute.sharded_array import ShardedArray

THRESHOLD = 0.6
_BLOCK = 2048
_NEIGHBORS = 64
_CELLS = 1024


def removed(rows: int, pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> int:
    """How many rows are merged away if one of each component stays."""
    a, b = (np.concatenate(each) for each in zip(*pairs, strict=True))
    graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(rows, rows))
    return int(rows - connected_components(graph, directed=False)[0])


def exact(vectors: np.ndarray) -> int:
    """All pairs by dense products of blocks, half of the matrix."""

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for top in range(0, len(vectors), _BLOCK):
            for left in range(top, len(vectors), _BLOCK):
                tile = vectors[top : top + _BLOCK] @ vectors[left : left + _BLOCK].T
                rows, columns = np.divmod(np.flatnonzero(tile >= THRESHOLD), tile.shape[1])
                yield rows + top, columns + left

    return removed(len(vectors), pairs())


def ivf_range(vectors: np.ndarray, probes: int) -> int:
    """FAISS inverted lists, range search."""
    import faiss

    index: Any = faiss.index_factory(vectors.shape[1], f"IVF{_CELLS},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[np.random.default_rng(0).permutation(len(vectors))[: 64 * _CELLS]])
    index.add(vectors)
    index.nprobe = probes

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(vectors), 8192):
            limits, _, found = index.range_search(vectors[start : start + 8192], THRESHOLD)
            yield np.repeat(np.arange(len(limits) - 1) + start, np.diff(limits).astype(np.int64)), found

    return removed(len(vectors), pairs())


def hnsw(vectors: np.ndarray, links: int = 16) -> int:
    """FAISS graph, 64 neighbors of each row."""
    import faiss

    index: Any = faiss.IndexHNSWFlat(vectors.shape[1], links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efSearch = _NEIGHBORS
    index.add(vectors)
    similar, found = index.search(vectors, _NEIGHBORS)
    rows, columns = np.nonzero(similar >= THRESHOLD)
    return removed(len(vectors), iter([(rows, found[rows, columns])]))


def scikit_learn(vectors: np.ndarray) -> int:
    """scikit-learn's neighbors within a radius, by brute force."""
    from sklearn.neighbors import NearestNeighbors

    radius = float(np.sqrt(2 - 2 * THRESHOLD))
    graph = NearestNeighbors(algorithm="brute").fit(vectors).radius_neighbors_graph(vectors, radius)
    return int(len(vectors) - connected_components(graph, directed=False)[0])


def autofaiss(vectors: np.ndarray) -> int:
    """The index that autofaiss chooses, 64 neighbors of each row."""
    from autofaiss import build_index

    index: Any = build_index(
        vectors, save_on_disk=False, metric_type="ip", max_index_memory_usage="1G", current_memory_available="4G",
        nb_cores=1, verbose=30,
    )[0]  # fmt: skip
    similar, found = index.search(vectors, _NEIGHBORS)
    rows, columns = np.nonzero(similar >= THRESHOLD)
    return removed(len(vectors), iter([(rows, found[rows, columns])]))


def fastdup(vectors: np.ndarray) -> int:
    """fastdup over given vectors, 64 neighbors of each row."""
    os.environ["SENTRY_OPT_OUT"] = "1"
    import fastdup

    with tempfile.TemporaryDirectory() as folder:
        fastdup.save_binary_feature(folder, [f"{row:09d}.jpg" for row in range(len(vectors))], vectors)
        settings = {"d": vectors.shape[1], "nearest_neighbors_k": _NEIGHBORS, "threshold": THRESHOLD, "num_threads": 1}
        fastdup.run("", work_dir=folder, run_mode=2, **settings)
        with (Path(folder) / "similarity.csv").open(newline="") as file:
            pairs = [(int(row["from"][:9]), int(row["to"][:9])) for row in csv.DictReader(file)]
    return removed(len(vectors), iter([tuple(np.array(pairs, dtype=np.int64).T)]))


def learned(vectors: ShardedArray, workers: WorkerPool) -> Cells:
    """The cells that Fovea makes for some vectors, by the settings of its step."""
    from curation.similarity.cells import SAMPLE, Cells, default_num_cells
    from curation.steps.config import NearDuplicates

    settings, count = NearDuplicates(), default_num_cells(len(vectors))
    sample = vectors.take(np.random.default_rng(0).permutation(len(vectors))[: SAMPLE * count])
    return Cells.learn(sample, count, settings.nprobe, settings.margin, workers)


def fovea(vectors: np.ndarray, threads: int = 1, memory: int = 4 << 30) -> int:
    """Fovea's join by cells."""
    from curation.similarity.selfjoin import SelfJoin
    from curation.similarity.tiles import CpuTiles, WorkerPool
    from infra.compute.sharded_array import ShardedArray

    source, workers = ShardedArray([vectors]), WorkerPool(CpuTiles(), threads)
    cells = learned(source, workers)
    with tempfile.TemporaryDirectory() as folder:
        forest = SelfJoin(cells, THRESHOLD, workers, Path(folder), memory).run(source, np.arange(len(vectors)))
    return len(forest.edges()[0])
