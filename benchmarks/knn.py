"""kNN classification beside the usual product and top-k in torch, and beside lightly: CPU seconds and memory."""

from __future__ import annotations

import numpy as np

from benchmarks.isolated import measured
from benchmarks.report import Row, compared, main

BANK, QUERIES, DIM, CLASSES, K = 50_000, 10_000, 384, 1000, 200


def features() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bank, its classes, and queries, unit vectors."""
    rng = np.random.default_rng(0)
    bank, queries = (rng.standard_normal((n, DIM), dtype=np.float32) for n in (BANK, QUERIES))
    for each in (bank, queries):
        each /= np.linalg.norm(each, axis=1, keepdims=True)
    return bank, rng.integers(0, CLASSES, BANK), queries


def _few() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    bank, labels, queries = features()
    return bank[:1000], labels[:1000], queries[:100]


def ours(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> list[np.ndarray]:
    from eval.protocols.knn import count_votes
    from infra.compute.vector_search import knn_search

    cosines, rows = knn_search(queries, bank, K)
    return [count_votes(cosines[:, :k], labels[rows[:, :k]], CLASSES, 0.07).argmax(1) for k in (10, 20, 100, K)]


def usual(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Product and top-k alone, without the votes."""
    import torch

    return (torch.from_numpy(queries) @ torch.from_numpy(bank).T).topk(K)[1].numpy()


def neighbors(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Ours, without the votes."""
    from infra.compute.vector_search import knn_search

    return knn_search(queries, bank, K)[1]


def lightlys(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    import torch
    from lightly.utils.benchmarking import knn_predict

    memory, marks = torch.from_numpy(bank).T.contiguous(), torch.from_numpy(labels)
    found = [knn_predict(some, memory, marks, CLASSES, K, 0.07)[:, 0] for some in torch.from_numpy(queries).split(256)]
    return torch.cat(found).numpy()


def measure() -> list[Row]:
    runs = [[measured(each, features, _few) for each in (neighbors, usual, ours, lightlys)] for _ in range(3)]
    seconds = np.median([[each.cpu_seconds for each in run] for run in runs], axis=0)
    before = (BANK + QUERIES) * DIM * 4 / 1e9  # of the features themselves
    peaks = np.median([[each.peak_gb for each in run] for run in runs], axis=0)
    same = float((runs[0][2].result[-1] == runs[0][3].result).mean())
    empty = measured(_nothing, features, _few).peak_gb
    return [
        compared(f"{K} nearest, CPU s", seconds[0], seconds[1], "s", 1.5),
        compared("memory beyond the features, GB", max(peaks[0] - empty, 1e-3), peaks[1] - empty, "GB", 10),
        compared("kNN at four k, CPU s, beside lightly at one", seconds[2], seconds[3], "s"),
        Row("answers as lightly's", same, "share"),
        Row("features, GB", before, "GB"),
    ]


def _nothing(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray) -> None:
    """What loading the libraries and the features takes."""
    import faiss  # noqa: F401
    import torch  # noqa: F401


if __name__ == "__main__":
    main("kNN", measure)
