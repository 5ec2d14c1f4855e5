"""All pairs of rows above a similarity, without comparing every row with every other.

Rows that are alike visit the same cells. Each cell is joined by dense tiles; what a tile finds goes into a forest at
once, so neither tiles nor pairs are kept. The work grows as rows to the power 1.5.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curation.similarity.cells import Cells
from curation.similarity.exact import pair_dots, rounding_error
from curation.similarity.forest import PAIR_BYTES, Forest
from curation.similarity.partition import InvertedLists, Members, Partition
from curation.similarity.tiles import Found, Tiles, WorkerPool
from infra.compute.sharded_array import ShardedArray
from infra.storage.atomic import atomic_write

_SIDE, _WIDTH = 192, 1 << 12  # rows of a tile on its two sides
_MOST_PAIRS = 1 << 20  # of a cell that are held
_SAVE_SECONDS = 60.0
_TOGETHER = 64  # cells between looks at the clock
_VECTORS_SHARE, _PAIRS_SHARE = 0.4, 0.2  # of the memory; the rest is for tiles and what is known of each row


@dataclass(frozen=True)
class PreviousJoin:
    """What an earlier join of some of the rows has found, by places."""

    assignments: InvertedLists
    """Of the rows that were joined with one another"""
    edges: Found
    """Their forest"""
    fresh: np.ndarray
    """The other rows, rising"""


@dataclass(frozen=True)
class SelfJoin:
    """A join of rows with themselves.

    Args:
        threshold: the least similarity of a pair.
        directory: for runs, and for what lets an interrupted join go on.
        memory: bytes.
    """

    cells: Cells
    threshold: float
    workers: WorkerPool
    directory: Path
    memory: int

    def partition(self, vectors: ShardedArray, rows: np.ndarray, known: PreviousJoin | None = None) -> Partition:
        """Rows of `vectors`, rising, by the cells they visit."""
        partition = Partition(self.cells, vectors, rows, self.directory, int(self.memory * _VECTORS_SHARE))
        if known is None:
            return partition.fill(np.arange(len(rows)), self.workers)
        return partition.set_known(known.assignments).fill(known.fresh, self.workers)

    def run(
        self, vectors: ShardedArray, rows: np.ndarray, reach: Callable[[int], object] = lambda done: None
    ) -> Forest:
        """The forest over places in `rows`, which rise; `reach` is told how many cells are done."""
        return self.run_partition(self.partition(vectors, rows), None, reach)

    def run_partition(self, partition: Partition, known: PreviousJoin | None, reach: Callable[[int], object]) -> Forest:
        """The forest over places in the partition's rows, on from what is known."""
        forest, done = self._begun(partition, known)
        reach(done)
        saved = time.monotonic()
        left = range(done, len(self.cells))
        for cell, found in zip(left, self.workers.map(lambda cell: self._cell(partition, cell), left), strict=True):
            forest.add(*found)
            if (cell + 1) % _TOGETHER == 0 or cell == left[-1]:
                reach(cell + 1)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self._save(forest, cell + 1, self._identity(partition, known))
                    saved = time.monotonic()
        forest.compact()
        self._path.unlink(missing_ok=True)
        return forest

    @property
    def _path(self) -> Path:
        return self.directory / "forest.npz"

    def _begun(self, partition: Partition, known: PreviousJoin | None) -> tuple[Forest, int]:
        """What an interrupted attempt at the same join has left, and how many cells it had done."""
        waiting, rows = int(self.memory * _PAIRS_SHARE / PAIR_BYTES), len(partition.rows)
        if self._path.exists():
            forest, facts = Forest.load(self._path, waiting)
            if forest.rows == rows and facts["of"] == self._identity(partition, known):
                return forest, facts["done"]
        forest = Forest(rows, waiting)
        if known is not None:
            forest.add(*known.edges)
        return forest, 0

    def _save(self, forest: Forest, done: int, of: int) -> None:
        with atomic_write(self._path) as partial:
            forest.save(partial, done=done, of=of)

    def _identity(self, partition: Partition, known: PreviousJoin | None) -> int:
        """Of what is joined and how, the vectors apart."""
        digest = hashlib.sha256(repr((self.threshold, self.cells.probes, self.cells.margin)).encode())
        fresh = [] if known is None else [known.fresh, *known.edges]
        for array in (self.cells.centroids.vectors, self.cells.dense, partition.rows, *fresh):
            digest.update(np.ascontiguousarray(array).data)
        return int.from_bytes(digest.digest()[:7], "big")

    def _cell(self, partition: Partition, cell: int) -> Found:
        """The new pairs of a cell; of one where all are alike a forest of them, since they would be too many."""
        fresh = partition.fresh_members(cell)
        if not len(fresh):
            return _NONE
        known = partition.known_members(cell)
        rows = np.concatenate([fresh.rows, known.rows])
        parts: list[Found] = []
        count = 0
        for found in _pairs(fresh, known, bool(self.cells.dense[cell]), self.threshold, self.workers.tiles):
            parts.append(found)
            count += len(found[0])
            if count > _MOST_PAIRS:
                forest = Forest(len(rows))
                for each in parts:
                    forest.add(*each)
                parts = [forest.edges()]
                count = len(parts[0][0])
        a, b, scores = (np.concatenate(each) for each in zip(*parts, strict=True)) if parts else _NONE
        return rows[a], rows[b], scores


_NONE = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))


def _pairs(fresh: Members, known: Members, crowded: bool, threshold: float, tiles: Tiles) -> Iterator[Found]:
    """Pairs of places among both, those of `known` after the others, with one at least that is fresh; where it is
    crowded, only those with an owner."""
    mine, theirs = (tiles.load(each.vectors) for each in (fresh, known))
    doubt = rounding_error(fresh.vectors.shape[1])
    meeting_all = fresh.primary if crowded else len(fresh)
    for rows in _blocks(0, meeting_all, _SIDE):
        for columns in _blocks(rows.start, len(fresh), _WIDTH):
            a, b, scores = tiles.find_above(mine[rows], mine[columns], threshold - doubt)
            a, b = a + rows.start, b + columns.start
            once = a < b
            found = a[once], b[once], scores[once]
            yield _confirm(fresh.vectors, fresh.vectors, found, threshold, doubt)
    for first, last, width in ((0, meeting_all, len(known)), (meeting_all, len(fresh), known.primary)):
        for rows in _blocks(first, last, _SIDE):
            for columns in _blocks(0, width, _WIDTH):
                a, b, scores = tiles.find_above(mine[rows], theirs[columns], threshold - doubt)
                found = a + rows.start, b + columns.start, scores
                a, b, scores = _confirm(fresh.vectors, known.vectors, found, threshold, doubt)
                yield a, b + len(fresh), scores


def _blocks(first: int, last: int, length: int) -> Iterator[slice]:
    for start in range(first, last, length):
        yield slice(start, min(start + length, last))


def _confirm(first: np.ndarray, second: np.ndarray, found: Found, threshold: float, doubt: float) -> Found:
    """Pairs of a row of the one and a row of the other, those in doubt decided exactly."""
    a, b, scores = found
    wanted = np.ones(len(a), dtype=bool)
    close = np.flatnonzero(scores < threshold + doubt)
    wanted[close] = pair_dots(first, second, a[close], b[close]) >= threshold
    return a[wanted], b[wanted], scores[wanted]
