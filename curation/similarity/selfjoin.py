"""All pairs of rows above a similarity, without comparing every row with every other.

Rows that are alike visit the same cells. Each cell is joined by dense tiles; what a tile finds goes into a forest at
once, so neither tiles nor pairs are kept. The work grows as rows to the power 1.5.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from curation.similarity.cells import Cells
from curation.similarity.exact import of_pairs, slack
from curation.similarity.forest import PAIR_BYTES, Forest
from curation.similarity.partition import Members, Partition
from curation.similarity.tiles import Found, Tiles, Workers
from infra.files import appearing
from infra.vectors import Vectors

_SIDE, _WIDTH = 192, 1 << 12  # rows of a tile on its two sides
_MOST_PAIRS = 1 << 20  # of a cell that are held
_SAVE_SECONDS = 60.0
_TOGETHER = 64  # cells between looks at the clock
_VECTORS_SHARE, _PAIRS_SHARE = 0.4, 0.2  # of the memory; the rest is for tiles and what is known of each row


@dataclass(frozen=True)
class Join:
    """A join of rows with themselves.

    Args:
        threshold: the least similarity of a pair.
        directory: for runs, and for what lets an interrupted join go on.
        memory: bytes.
    """

    cells: Cells
    threshold: float
    workers: Workers
    directory: Path
    memory: int

    def run(self, vectors: Vectors, rows: np.ndarray, reach: Callable[[int], object] = lambda done: None) -> Forest:
        """The forest over places in `rows`, which rise; `reach` is told how many cells are done."""
        partition = Partition(self.cells, self.directory, int(self.memory * _VECTORS_SHARE))
        partition.fill(vectors, rows, self.workers)
        forest, done = self._begun(len(rows))
        reach(done)
        saved = time.monotonic()
        for start in range(done, len(self.cells), _TOGETHER):
            some = range(start, min(start + _TOGETHER, len(self.cells)))
            for found in self.workers.map(lambda cell: self._cell(partition, cell), some):
                forest.add(*found)
            reach(some.stop)
            if time.monotonic() - saved > _SAVE_SECONDS:
                self._save(forest, some.stop)
                saved = time.monotonic()
        forest.settle()
        self._path.unlink(missing_ok=True)
        return forest

    @property
    def _path(self) -> Path:
        return self.directory / "forest.npz"

    def _begun(self, rows: int) -> tuple[Forest, int]:
        """What an interrupted attempt at the same join has left, and how many cells it had done."""
        waiting = int(self.memory * _PAIRS_SHARE / PAIR_BYTES)
        if self._path.exists():
            forest, facts = Forest.load(self._path, waiting)
            if forest.rows == rows and facts["of"] == self._identity:
                return forest, facts["done"]
        return Forest(rows, waiting), 0

    def _save(self, forest: Forest, done: int) -> None:
        with appearing(self._path) as partial:
            forest.save(partial, done=done, of=self._identity)

    @cached_property
    def _identity(self) -> int:
        content = self.cells.centroids.vectors.tobytes() + self.cells.crowded.tobytes()
        rule = repr((self.threshold, self.cells.probes, self.cells.margin)).encode()
        return int.from_bytes(hashlib.sha256(content + rule).digest()[:7], "big")

    def _cell(self, partition: Partition, cell: int) -> Found:
        """The pairs of a cell; of one where all are alike a forest of them, since they would be too many."""
        members = partition.members(cell)
        parts: list[Found] = []
        count = 0
        for found in _pairs(members, bool(self.cells.crowded[cell]), self.threshold, self.workers.tiles):
            parts.append(found)
            count += len(found[0])
            if count > _MOST_PAIRS:
                forest = Forest(len(members.rows))
                for each in parts:
                    forest.add(*each)
                parts = [forest.edges()]
                count = len(parts[0][0])
        a, b, scores = (np.concatenate(each) for each in zip(*parts, strict=True)) if parts else _NONE
        return members.rows[a], members.rows[b], scores


_NONE = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))


def _pairs(members: Members, crowded: bool, threshold: float, tiles: Tiles) -> Iterator[Found]:
    """Pairs of places among the members; where it is crowded, only those with an owner."""
    held = tiles.hold(members.vectors)
    doubt = slack(members.vectors.shape[1])
    last = members.owners if crowded else len(members.rows)
    for top in range(0, last, _SIDE):
        bottom = min(top + _SIDE, last)
        for left in range(top, len(members.rows), _WIDTH):
            rows, columns, scores = tiles.above(held[top:bottom], held[left : left + _WIDTH], threshold - doubt)
            a, b = rows + top, columns + left
            yield _sure(members.vectors, (a, b, scores), threshold, doubt)


def _sure(vectors: np.ndarray, found: Found, threshold: float, doubt: float) -> Found:
    """Each pair once, those in doubt decided exactly."""
    a, b, scores = found
    wanted = a < b
    close = np.flatnonzero(wanted & (scores < threshold + doubt))
    wanted[close] = of_pairs(vectors, vectors, a[close], b[close]) >= threshold
    return a[wanted], b[wanted], scores[wanted]
