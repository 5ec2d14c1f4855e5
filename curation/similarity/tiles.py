"""Tiles of the matrix of similarities: a dense product, and at once what is wanted of it, so that no tile is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from curation.similarity.exact import widen
from infra.compute.ray_cluster import RayCluster

T = TypeVar("T")
R = TypeVar("R")

Found = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows of the one side and of the other, int64, and the similarities, float32, by rising row of the first."""
_WAITING = 4  # results a thread that may wait to be taken


class Tiles(Protocol):
    """Where tiles are computed. Similarities are those of float32: see `exact.slack` for how far off they are."""

    def load(self, vectors: np.ndarray) -> Any:
        """Float16 or float32 `[n, dim]` in the form that the other methods take."""

    def find_above(self, a: Any, b: Any, cut: float | np.ndarray) -> Found:
        """All pairs whose similarity is at least `cut`: one for all, or one for each row of `a`, float32 `[m, 1]`."""

    def find_near_best(self, a: Any, b: Any, margin: float) -> Found:
        """For each row of `a` all rows of `b` that are at most `margin` less similar than the most similar one."""

    def find_highest(self, a: Any, b: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row of `a` the k most similar rows of `b` in any order, int64 `[m, k]`, and the similarities."""


class CpuTiles:
    """With numpy, a tile on one core."""

    def load(self, vectors: np.ndarray) -> np.ndarray:
        return widen(vectors) if vectors.dtype == np.float16 else vectors

    def find_above(self, a: np.ndarray, b: np.ndarray, cut: float | np.ndarray) -> Found:
        return self._to_numpy(a @ b.T, cut)

    def find_near_best(self, a: np.ndarray, b: np.ndarray, margin: float) -> Found:
        tile = a @ b.T
        return self._to_numpy(tile, (tile.max(axis=1) - np.float32(margin))[:, None])

    def find_highest(self, a: np.ndarray, b: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        tile = a @ b.T
        if k == tile.shape[1]:
            return np.broadcast_to(np.arange(k), tile.shape), tile
        chosen = np.argpartition(tile, tile.shape[1] - k, axis=1)[:, -k:]
        return chosen, np.take_along_axis(tile, chosen, axis=1)

    def _to_numpy(self, tile: np.ndarray, cut: float | np.ndarray) -> Found:
        places = np.flatnonzero(tile >= cut)
        rows, columns = np.divmod(places, tile.shape[1])
        return rows, columns, tile.ravel()[places]


class TorchTiles:
    """With torch, on a GPU."""

    def __init__(self, device: str) -> None:
        import torch

        self._torch, self._device = torch, torch.device(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # its rounding is beyond the slack

    def load(self, vectors: np.ndarray) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(vectors)).to(self._device).float()

    def find_above(self, a: Any, b: Any, cut: float | np.ndarray) -> Found:
        return self._to_numpy(a @ b.T, cut if isinstance(cut, float) else self._torch.from_numpy(cut).to(self._device))

    def find_near_best(self, a: Any, b: Any, margin: float) -> Found:
        tile = a @ b.T
        return self._to_numpy(tile, tile.amax(dim=1, keepdim=True) - margin)

    def find_highest(self, a: Any, b: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, chosen = (a @ b.T).topk(k, dim=1, sorted=False)
        return chosen.cpu().numpy(), scores.cpu().numpy()

    def _to_numpy(self, tile: Any, cut: Any) -> Found:
        rows, columns = self._torch.nonzero(tile >= cut, as_tuple=True)
        return rows.cpu().numpy(), columns.cpu().numpy(), tile[rows, columns].cpu().numpy()


@dataclass(frozen=True)
class WorkerPool:
    """Tiles and the threads that compute them."""

    tiles: Tiles
    threads: int
    cluster: RayCluster | None = None
    """Machines that share the work of `map`"""

    def __reduce__(self) -> tuple[type[WorkerPool], tuple[Tiles, int]]:
        return WorkerPool, (self.tiles, 1)  # who gets a part of the work does it alone

    def without_cluster(self) -> WorkerPool:
        """One thread of them."""
        return WorkerPool(self.tiles, 1)

    def map_locally(self) -> WorkerPool:
        """Those of this machine: for work that would be sent more often than it is worth."""
        return WorkerPool(self.tiles, self.threads)

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of the items; only a few wait at a time. `work` must not change what it was given."""
        if self.cluster is not None:
            yield from self.cluster.map(work, items)
            return
        with self._libraries.limit(limits=1, user_api="blas"):  # of a thread each, not of all cores
            if self.threads == 1:
                yield from map(work, items)
                return
            with ThreadPoolExecutor(self.threads) as pool:
                waiting = iter(items)
                while some := list(islice(waiting, self.threads * _WAITING)):
                    yield from pool.map(work, some)

    @cached_property
    def _libraries(self) -> ThreadpoolController:
        return ThreadpoolController()  # it looks through all that is loaded, which takes a while


def make_workers(threads: int, cluster: RayCluster | None = None) -> WorkerPool:
    """On a cluster, if one is given; on the GPU, if there is one; else on as many cores."""
    if cluster is not None:
        return WorkerPool(CpuTiles(), threads, cluster)
    if Path("/dev/nvidiactl").exists():  # only then torch, which takes seconds and half a gigabyte to import
        import torch

        if torch.cuda.is_available():
            return WorkerPool(TorchTiles("cuda"), 1)
    return WorkerPool(CpuTiles(), threads)
