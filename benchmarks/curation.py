"""Curation beside its peers, on one core: near-duplicates of 200,000 vectors, and hierarchical k-means.

About a quarter of an hour; with fastdup and autofaiss, where they are installed, three times that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import numpy as np

from benchmarks import hierarchical_kmeans_peers, near_duplicate_peers, report
from benchmarks.isolated import Measured, measured
from benchmarks.report import Row, compared
from benchmarks.synthetic_vectors import planted

_ROWS, _DIM = 200_000, 256
_WARM = 5_000  # rows of the call that loads libraries
_FEW = 20_000  # rows for what would take hours
_SETS = {"long-tailed": 0.65, "isotropic": 0.0}
_RECALL = {"long-tailed": 0.995, "isotropic": 0.99}
_GAIN = {"long-tailed": 25.0, "isotropic": 14.0}


def _vectors(weight: float, count: int) -> tuple[np.ndarray]:
    return (planted(count, _DIM, 1, weight).astype(np.float32),)


def _stored(weight: float, count: int) -> tuple[np.ndarray]:
    return (planted(count, _DIM, 1, weight),)


def _join(work: Callable[..., int], weight: float, count: int = _ROWS) -> Measured:
    prepare = _stored if work is near_duplicate_peers.fovea else _vectors
    return measured(work, partial(prepare, weight, count), partial(prepare, weight, _WARM))


def _near_duplicates(name: str, weight: float) -> list[Row]:
    true, ours = _join(near_duplicate_peers.exact, weight), _join(near_duplicate_peers.fovea, weight)
    peers = {
        f"FAISS IVF range, {probes} probes": partial(near_duplicate_peers.ivf_range, probes=probes)
        for probes in (4, 8, 16)
    }
    others = {name: getattr(near_duplicate_peers, name) for name in ("fastdup", "autofaiss") if find_spec(name)}
    peers |= {"FAISS HNSW16": near_duplicate_peers.hnsw, **others}
    found = {title: _join(work, weight) for title, work in peers.items()}
    share = ours.result / true.result
    table = [
        compared(f"{name}: CPU of the exact join", ours.cpu_seconds, true.cpu_seconds, "CPU s", _GAIN[name]),
        Row(f"{name}: removals found", share, "", _RECALL[name], share / _RECALL[name], 1.0),
        Row(f"{name}: peak memory", ours.peak_gb, "GB", true.peak_gb, true.peak_gb / ours.peak_gb),
    ]
    enough = [title for title in peers if found[title].result / true.result >= _RECALL[name]]
    best = min(enough, key=lambda title: found[title].cpu_seconds, default=None)
    for title, peer in found.items():
        label = f"{name}: {title}, which finds {peer.result / true.result:.4f}, {peer.peak_gb:.2f} GB"
        table.append(compared(label, ours.cpu_seconds, peer.cpu_seconds, "CPU s", 3.0 if title == best else None))
    return table


def _few() -> list[Row]:
    """Beside what cannot do 200,000: on a tenth, where ours is the exact join."""
    ours = _join(near_duplicate_peers.fovea, 0.65, _FEW)
    peer = _join(near_duplicate_peers.scikit_learn, 0.65, _FEW)
    assert ours.result == peer.result
    return [compared(f"scikit-learn radius neighbors, {_FEW} rows", ours.cpu_seconds, peer.cpu_seconds, "CPU s")]


def _growth() -> Row:
    """The exponent by which CPU grows with rows."""
    counts = [50_000, 100_000, 200_000, 400_000]
    seconds = [_join(near_duplicate_peers.fovea, 0.65, count).cpu_seconds for count in counts]
    return Row("exponent of growth", float(np.polyfit(np.log(counts), np.log(seconds), 1)[0]), "", 1.5, None)


def _hierarchy() -> list[Row]:
    prepare, warm = (partial(_stored, 0.65, count) for count in (_FEW, _WARM))
    vectors = prepare()[0]
    ours, peer = (
        measured(work, prepare, warm)
        for work in (hierarchical_kmeans_peers.by_fovea, hierarchical_kmeans_peers.by_scikit_learn)
    )
    told = [compared("hierarchical k-means", ours.cpu_seconds, peer.cpu_seconds, "CPU s", 5.0)]
    mine, theirs = (hierarchical_kmeans_peers.objective(vectors, each.result) for each in (ours, peer))
    told.append(compared("hierarchical k-means: objective", mine, theirs, "squared distance"))
    mine, theirs = (hierarchical_kmeans_peers.spacing(each.result) for each in (ours, peer))
    told.append(Row("hierarchical k-means: spacing of centroids", mine, "squared distance", theirs, mine / theirs))
    return told


def measure() -> Sequence[Row]:
    table = [row for name, weight in _SETS.items() for row in _near_duplicates(name, weight)]
    return [*table, *_few(), _growth(), *_hierarchy()]


if __name__ == "__main__":
    report.main("Curation", measure)
