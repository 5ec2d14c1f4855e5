"""Cells: where near vectors meet. Each row visits the cells of the centroids that are about as near as its nearest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation.similarity.exact import is_zero
from curation.similarity.kmeans import Centroids, train
from curation.similarity.tiles import WorkerPool

SINGLE_CELL_ROWS = 20_000  # rows up to which one cell for all is cheapest
SAMPLE = 12  # rows a centroid is trained on
_ITERATIONS = 3
_CELLS = 2.3  # a square root of rows: as much work in finding cells as within them
_DENSE = 1.5  # times the usual number of visits


@dataclass(frozen=True)
class CellAssignments:
    """Pairs of a row and a cell; int64."""

    rows: np.ndarray
    cells: np.ndarray
    primary: np.ndarray
    """Whether the cell is the row's nearest, bool"""


@dataclass(frozen=True)
class Cells:
    """What decides which rows meet. It is a function of the two rows alone, so that rows may come and go."""

    centroids: Centroids
    dense: np.ndarray
    """Cells, bool, in which only owners meet all others: visitors of a dense region meet elsewhere too."""
    probes: int
    margin: float

    @classmethod
    def one(cls, dim: int) -> Cells:
        """A single cell, where all meet."""
        return cls(Centroids(np.zeros((1, dim), dtype=np.float16)), np.zeros(1, dtype=bool), 1, 0.0)

    @classmethod
    def learn(cls, sample: np.ndarray, count: int, probes: int, margin: float, workers: WorkerPool) -> Cells:
        """Learn cells from a sample of rows in random order, float16 `[m, dim]`."""
        workers = workers.map_locally()
        free = cls(train(sample, np.arange(count), _ITERATIONS, workers), np.zeros(count, dtype=bool), probes, margin)
        visits = np.bincount(free.assign(sample, workers).cells, minlength=count)
        return cls(free.centroids, visits > _DENSE * visits.mean(), probes, margin)

    def __len__(self) -> int:
        return len(self.centroids)

    def assign(self, rows: np.ndarray, workers: WorkerPool) -> CellAssignments:
        """The cells of rows, float16 `[m, dim]`: at most `probes` each, at most `margin` less similar than the best."""
        if len(self) == 1:
            everyone = np.arange(len(rows))
            return CellAssignments(everyone, np.zeros(len(rows), dtype=np.int64), np.ones(len(rows), dtype=bool))
        held, step = self.centroids.resident(workers), self.centroids.block
        starts = range(0, len(rows), step)
        parts = list(workers.map(lambda start: self._of_block(rows[start : start + step], held, workers), starts))
        joined = [np.concatenate([getattr(part, name) for part in parts]) for name in ("cells", "primary")]
        places = np.concatenate([part.rows + start for part, start in zip(parts, starts, strict=True)])
        return CellAssignments(places, *joined)

    def _of_block(self, block: np.ndarray, held: Any, workers: WorkerPool) -> CellAssignments:
        """Zero vectors, which are like nothing, visit nothing: every cell would be as near."""
        there = np.flatnonzero(~is_zero(block))
        found = self._assign_block(block[there], held, workers)
        return CellAssignments(there[found.rows], found.cells, found.primary)

    def _assign_block(self, block: np.ndarray, held: Any, workers: WorkerPool) -> CellAssignments:
        doubt, width = 2 * self.centroids.rounding_error, self.probes + 1
        rows, cells, found = workers.tiles.find_near_best(
            self.centroids.load(block, workers), held, self.margin + doubt
        )
        leading, similar = _leading(np.argsort(4.0 * rows - found), rows, cells, found, len(block), width)
        unsure = self._max_error(similar, doubt)
        if unsure.any():
            again = np.flatnonzero(unsure[rows])
            rows, cells = rows[again], cells[again]
            exact = self.centroids.similarities(block, rows, cells)
            order = np.lexsort((cells, -exact, rows))
            sure = _leading(order, rows, cells, exact, len(block), width)
            leading[unsure], similar[unsure] = sure[0][unsure], sure[1][unsure]
        chosen, rank = np.nonzero((similar[:, :1] - similar <= self.margin)[:, : self.probes])
        return CellAssignments(chosen, leading[chosen, rank], rank == 0)

    def _max_error(self, similar: np.ndarray, doubt: float) -> np.ndarray:
        """Rows, bool, whose choice hangs on similarities that are closer than the doubt about them."""
        edge = (np.abs(similar[:, :1] - similar - self.margin) <= 2 * doubt).any(axis=1)
        before, after = similar[:, [0, self.probes - 1]], similar[:, [1, self.probes]]
        return edge | ((after >= before - 2 * doubt) & np.isfinite(after)).any(axis=1)


def _leading(
    order: np.ndarray, rows: np.ndarray, cells: np.ndarray, similar: np.ndarray, count: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `width` cells of each row and their similarities, -inf where there are fewer; `[count, width]`.

    Args:
        order: what sorts the candidates, whose rows rise, by row and falling similarity.
    """
    rank = np.arange(len(rows)) - np.searchsorted(rows, np.arange(count))[rows]
    near = np.flatnonzero(rank < width)
    at, order = (rows[near], rank[near]), order[near]
    leading, found = np.zeros((count, width), dtype=np.int64), np.full((count, width), -np.inf)
    leading[at], found[at] = cells[order], similar[order]
    return leading, found


def default_num_cells(rows: int) -> int:
    """How many cells to make for so many rows."""
    return 1 if rows <= SINGLE_CELL_ROWS else round(_CELLS * math.sqrt(rows))
