"""Rows sorted by the cells they visit: in memory where they fit in, else in runs on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from curation.similarity.cells import CellAssignments, Cells
from curation.similarity.tiles import WorkerPool
from infra.compute.sharded_array import ShardedArray

_BLOCK = 1 << 14  # rows read at a time
_FEW = 1 << 15  # cells whose visits are sorted by 16 bits, which numpy does six times as fast
_HALF = 2  # bytes of a component
_VISIT_BYTES = 30  # of a visit while a run is sorted; few rows visit as many cells as they may


@dataclass(frozen=True)
class Members:
    """Who visits a cell: first its owners."""

    rows: np.ndarray
    """Places among the partitioned rows, int64 `[m]`"""
    vectors: np.ndarray
    """Float16 `[m, dim]`"""
    primary: int

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class InvertedLists:
    """Visits of some rows, sorted by cell, in each cell owners before visitors."""

    rows: np.ndarray
    """Who visits, int64 `[visits]`"""
    starts: np.ndarray
    """Of each cell, and the end; int64 `[cells + 1]`"""
    primary: np.ndarray
    """How many of each cell's visits are of owners; int64 `[cells]`"""

    def shifted(self, place: np.ndarray) -> InvertedLists:
        """The same visits by other names of the rows, without those that have none (-1).

        Args:
            place: the new name of each row, int64.
        """
        rows = place[self.rows]
        there = rows >= 0
        before = np.concatenate([[0], np.cumsum(there)])
        borders = self.starts[:-1] + self.primary
        return InvertedLists(rows[there], before[self.starts], before[borders] - before[self.starts[:-1]])

    def parts(self, cell: int) -> tuple[slice, slice]:
        """Where a cell's owners are, and its visitors."""
        start, stop = (int(each) for each in self.starts[cell : cell + 2])
        border = start + int(self.primary[cell])
        return slice(start, border), slice(border, stop)


@dataclass(frozen=True)
class _OpenLists:
    """A run with the vectors of its rows."""

    run: InvertedLists
    """By places in `index_in`"""
    places: np.ndarray
    """Of the run's rows among the partitioned rows, rising"""
    vectors: np.ndarray | Path | ShardedArray
    """Of `index_in` in memory; of the visits in a file of float16; of all rows where they come from"""
    source: np.ndarray
    """Rows of those vectors, for the last"""

    def take(self, some: slice) -> tuple[np.ndarray, np.ndarray]:
        """Places and vectors of some visits."""
        rows = self.run.rows[some]
        if isinstance(self.vectors, Path):
            return self.places[rows], self._read(self.vectors, some)
        if isinstance(self.vectors, ShardedArray):
            return self.places[rows], self.vectors.take(self.source[rows])
        return self.places[rows], self.vectors[rows]

    def _read(self, file: Path, some: slice) -> np.ndarray:
        dim = file.stat().st_size // (_HALF * max(len(self.run.rows), 1))
        count = some.stop - some.start
        return np.fromfile(file, np.float16, count * dim, offset=_HALF * dim * some.start).reshape(count, dim)


@dataclass
class Partition:
    """Rows by cell: those that are to be joined, and those that have been joined with one another before.

    Args:
        vectors: where the rows' vectors lie.
        rows: of them, rising; places count these.
        directory: where runs are written if there are several.
        most: bytes of vectors that may be held in memory.
    """

    cells: Cells
    vectors: ShardedArray
    rows: np.ndarray
    directory: Path
    most: int
    _fresh: list[_OpenLists] = field(default_factory=list)
    _known: list[_OpenLists] = field(default_factory=list)

    def set_known(self, run: InvertedLists) -> Partition:
        """Add visits of rows, by their places, that have been joined with one another."""
        self._known.append(_OpenLists(run, np.arange(len(self.rows)), self.vectors, self.rows))
        return self

    def fill(self, places: np.ndarray, workers: WorkerPool) -> Partition:
        """Sort some of the rows, rising, by the cells they visit."""
        size = max(int(self.most // (_HALF * self.vectors.dim + _VISIT_BYTES * self.cells.probes)), 1)
        for first in range(0, len(places), size):
            self._add(places[first : first + size], workers, alone=size >= len(places))
        return self

    def inverted_lists(self) -> InvertedLists:
        """All visits, by places."""
        runs = [(held.run, held.places) for held in (*self._known, *self._fresh)]
        owners = np.sum([run.primary for run, _ in runs], axis=0)
        visits = np.sum([np.diff(run.starts) for run, _ in runs], axis=0)
        starts = np.concatenate([[0], np.cumsum(visits)])
        rows = np.empty(starts[-1], dtype=np.int64)
        free = [starts[:-1].copy(), starts[:-1] + owners]  # where the next owner and the next visitor of each cell go
        for run, places in runs:
            for begins, count, at in (
                (run.starts[:-1], run.primary, free[0]),
                (run.starts[:-1] + run.primary, np.diff(run.starts) - run.primary, free[1]),
            ):
                rows[_slices(at, count)] = places[run.rows[_slices(begins, count)]]
                at += count
        return InvertedLists(rows, starts, owners)

    def _add(self, places: np.ndarray, workers: WorkerPool, alone: bool) -> None:
        rows, vectors, cells = self.rows[places], self.vectors, self.cells
        starts, one = range(0, len(rows), _BLOCK), workers.without_cluster()
        held = np.empty((len(rows), vectors.dim), dtype=np.float16)
        for start in starts:
            held[start : start + _BLOCK] = vectors.take(rows[start : start + _BLOCK])

        def here(some: slice) -> np.ndarray:
            return held[some]

        def there(some: slice) -> np.ndarray:  # other machines read for themselves
            return vectors.take(rows[some])

        read = here if workers.cluster is None else there

        def visits(start: int) -> CellAssignments:
            found = cells.assign(read(slice(start, start + _BLOCK)), one)
            return CellAssignments(found.rows + start, found.cells.astype(np.int32), found.primary)

        run = self._sort(list(workers.map(visits, starts)))
        self._fresh.append(_OpenLists(run, places, held if alone else self._spill(held, run.rows), rows))

    def _sort(self, found: list[CellAssignments]) -> InvertedLists:
        rows, cells, owner = (np.concatenate([getattr(each, name) for each in found]) for name in _COLUMNS)
        place = (cells * np.int64(2) + ~owner).astype(np.uint16 if len(self.cells) <= _FEW else np.int64)
        order = np.argsort(place, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=len(self.cells)))])
        return InvertedLists(rows[order], starts, np.bincount(cells[owner], minlength=len(self.cells)))

    def _spill(self, held: np.ndarray, order: np.ndarray) -> Path:
        path = self.directory / f"run-{len(self._fresh):05d}.f16"
        with path.open("wb") as file:  # written, not mapped: mapped pages would count as memory until they are on disk
            for start in range(0, len(order), _BLOCK):
                file.write(held[order[start : start + _BLOCK]].tobytes())
        return path

    def fresh_members(self, cell: int) -> Members:
        """Of the rows to be joined those that visit a cell."""
        return self._members(self._fresh, cell)

    def known_members(self, cell: int) -> Members:
        """Of those that have been joined with one another."""
        return self._members(self._known, cell)

    def _members(self, held: list[_OpenLists], cell: int) -> Members:
        parts = [each.run.parts(cell) for each in held]
        pieces = [each.take(part[sort]) for sort in (0, 1) for each, part in zip(held, parts, strict=True)]
        if not pieces:
            return Members(np.empty(0, dtype=np.int64), np.empty((0, self.vectors.dim), dtype=np.float16), 0)
        rows, vectors = (np.concatenate(each) for each in zip(*pieces, strict=True))
        return Members(rows, vectors, sum(part[0].stop - part[0].start for part in parts))


def _slices(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers that follow one another from each of some, int64 `[counts.sum()]`."""
    return np.repeat(begins - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())


_COLUMNS = ("rows", "cells", "primary")
