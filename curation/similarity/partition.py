"""Rows sorted by the cells they visit: in memory where they fit in, else in runs on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from curation.similarity.cells import Cells, Visits
from curation.similarity.tiles import Workers
from infra.vectors import Vectors

_BLOCK = 1 << 14  # rows read at a time
_FEW = 1 << 15  # cells whose visits are sorted by 16 bits, which numpy does six times as fast
_VISIT_BYTES = 30  # of a visit while a run is sorted; few rows visit as many cells as they may


@dataclass(frozen=True)
class Members:
    """Who visits a cell: first its owners, each sort by rising row."""

    rows: np.ndarray
    """Places among the partitioned rows, int64 `[m]`"""
    vectors: np.ndarray
    """Float16 `[m, dim]`"""
    owners: int


@dataclass(frozen=True)
class _Run:
    """A stretch of rows, sorted by cell."""

    rows: np.ndarray
    """Of each visit, sorted by cell, owners before visitors"""
    starts: np.ndarray
    """Of each cell, and the end"""
    owners: np.ndarray
    """How many of each cell's visits"""
    first: int
    """The first row of the stretch"""
    vectors: np.ndarray | Path
    """Of the stretch's rows in memory; of the visits in a file"""

    def take(self, start: int, stop: int) -> np.ndarray:
        if isinstance(self.vectors, Path):
            return np.load(self.vectors, mmap_mode="r", allow_pickle=False)[start:stop]
        return self.vectors[self.rows[start:stop] - self.first]


@dataclass
class Partition:
    """Rows by cell.

    Args:
        directory: where runs are written if there are several.
        most: bytes of vectors that may be held in memory.
    """

    cells: Cells
    directory: Path
    most: int
    _runs: list[_Run] = field(default_factory=list)

    def fill(self, vectors: Vectors, rows: np.ndarray, workers: Workers) -> Partition:
        """Sort some rows of `vectors`, rising, by the cells they visit."""
        size = max(int(self.most // (2 * vectors.dim + _VISIT_BYTES * self.cells.probes)), 1)
        for first in range(0, len(rows), size):
            self._add(vectors, rows[first : first + size], first, workers, alone=size >= len(rows))
        return self

    def _add(self, vectors: Vectors, rows: np.ndarray, first: int, workers: Workers, alone: bool) -> None:
        held = np.empty((len(rows), vectors.dim), dtype=np.float16)
        found = []
        for start in range(0, len(rows), _BLOCK):
            block = vectors.take(rows[start : start + _BLOCK])
            held[start : start + len(block)] = block
            visits = self.cells.visits(block, workers)
            found.append(Visits(visits.rows + start, visits.cells.astype(np.int32), visits.owners))
        order, starts, owners = self._sorted(found)
        self._runs.append(_Run(order + first, starts, owners, first, held if alone else self._spilled(held, order)))

    def _sorted(self, found: list[Visits]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of visits by cell, where each cell starts, and its owners."""
        rows, cells, owner = (np.concatenate([getattr(each, name) for each in found]) for name in _COLUMNS)
        place = (cells * np.int64(2) + ~owner).astype(np.uint16 if len(self.cells) <= _FEW else np.int64)
        order = np.argsort(place, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=len(self.cells)))])
        return rows[order], starts, np.bincount(cells[owner], minlength=len(self.cells))

    def _spilled(self, held: np.ndarray, order: np.ndarray) -> Path:
        path = self.directory / f"run-{len(self._runs):05d}.npy"
        header = {"descr": "<f2", "fortran_order": False, "shape": (len(order), held.shape[1])}
        with path.open("wb") as file:  # written, not mapped: mapped pages would count as memory until they are on disk
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(order), _BLOCK):
                file.write(held[order[start : start + _BLOCK]].tobytes())
        return path

    def members(self, cell: int) -> Members:
        """Who visits a cell."""
        parts = [*self._pieces(cell, owners=True), *self._pieces(cell, owners=False)]
        rows, vectors = (np.concatenate(each) for each in zip(*parts, strict=True))
        return Members(rows, vectors, int(sum(run.owners[cell] for run in self._runs)))

    def _pieces(self, cell: int, owners: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for run in self._runs:
            start, stop = (int(each) for each in run.starts[cell : cell + 2])
            border = start + int(run.owners[cell])
            low, high = (start, border) if owners else (border, stop)
            yield run.rows[low:high], run.take(low, high)


_COLUMNS = ("rows", "cells", "owners")
