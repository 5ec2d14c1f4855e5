"""A forest of the highest similarities: all that pairs tell of components, at every threshold, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

PAIR_BYTES = 120  # of memory, while the forest is made
_FEW = 1 << 17  # pairs that are not worth halving


class Forest:
    """The maximum spanning forest of pairs that are added bit by bit.

    Two rows are connected by pairs of at least some similarity if and only if they are in the forest, so its edges, at
    most one a row, give the components for every threshold.

    Args:
        rows: how many there are.
        waiting: how many pairs may wait before the forest is made anew; a pair takes about `PAIR_BYTES` then.
    """

    def __init__(self, rows: int, waiting: int = 1 << 22) -> None:
        self.rows, self._most = rows, waiting
        self._a, self._b = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        self._scores = np.empty(0, dtype=np.float32)
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._count = 0
        self.pairs = 0
        """Pairs added so far, those that were met twice counted twice."""

    def add(self, a: np.ndarray, b: np.ndarray, scores: np.ndarray) -> None:
        """Add pairs of rows, int64 `[m]`, with their similarities, float32 `[m]`."""
        self._waiting.append((a, b, scores))
        self._count += len(a)
        self.pairs += len(a)
        if self._count > max(self._most, len(self._a) // 2):
            self.compact()

    def compact(self) -> None:
        """Make the forest of what has been added."""
        if not self._waiting:
            return
        parts = [(self._a, self._b, self._scores), *self._waiting]
        a, b, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
        self._a, self._b, self._scores = _spanning_edges(self.rows, a, b, scores)
        self._waiting, self._count = [], 0

    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pairs of rows, int64, and similarities, float32; by rising rows."""
        self.compact()
        return self._a, self._b, self._scores

    def components(self) -> np.ndarray:
        """The component of each row, int32 `[rows]`."""
        a, b, _ = self.edges()
        return components(self.rows, a, b)

    def save(self, path: Path, **facts: int) -> None:
        """Write the forest, and some numbers beside it."""
        a, b, scores = self.edges()
        with path.open("wb") as file:
            np.savez(file, a=a, b=b, scores=scores, rows=self.rows, pairs=self.pairs, **facts)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path, waiting: int = 1 << 22) -> tuple[Forest, dict[str, int]]:
        """A saved forest, and the numbers beside it."""
        with np.load(path, allow_pickle=False) as file:
            content = dict(file)
        forest = cls(int(content.pop("rows")), waiting)
        forest.pairs = int(content.pop("pairs"))
        forest._a, forest._b, forest._scores = (content.pop(name) for name in ("a", "b", "scores"))
        return forest, {name: int(value) for name, value in content.items()}


Edges = tuple[np.ndarray, np.ndarray, np.ndarray]


def _spanning_edges(rows: int, a: np.ndarray, b: np.ndarray, scores: np.ndarray) -> Edges:
    if len(a) > _FEW:  # what the higher half connects needs none of the lower half, which is most of dense regions
        high = scores >= np.partition(scores, len(scores) // 2)[len(scores) // 2]
        if not high.all():
            upper = _spanning_edges(rows, a[high], b[high], scores[high])
            labels = components(rows, upper[0], upper[1])
            rest = ~high & (labels[a] != labels[b])
            a, b, scores = (np.concatenate([x, y[rest]]) for x, y in zip(upper, (a, b, scores), strict=True))
    pair, scores = _by_pair(np.minimum(a, b) * rows + np.maximum(a, b), scores)
    low, high = np.divmod(pair, rows)
    best = _sort_descending(scores)  # of equal ones the first pair: there is only one such forest
    rank = np.empty(len(best))
    rank[best] = np.arange(1, len(best) + 1)
    starts = np.concatenate([[0], np.cumsum(np.bincount(low, minlength=rows))])
    tree = minimum_spanning_tree(csr_array((rank, high, starts), shape=(rows, rows))).tocoo()
    chosen = np.sort(best[tree.data.astype(np.int64) - 1])
    return low[chosen], high[chosen], scores[chosen]


def _sort_descending(scores: np.ndarray) -> np.ndarray:
    """Places of float32 numbers, the highest first, of equal ones the first; numpy sorts whole numbers several times
    faster than it finds an order."""
    bits = scores.view(np.int32)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = ~rising.astype(np.int64) << 32 | np.arange(len(bits))
    return np.sort(keys) & 0xFFFFFFFF


def _by_pair(pair: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs in rising order, each once with its highest score: two tiles may round it differently."""
    order = np.argsort(pair, kind="stable")
    pair, scores = pair[order], scores[order]
    first = np.flatnonzero(np.diff(pair, prepend=-1))
    return (pair[first], np.maximum.reduceat(scores, first)) if len(first) else (pair, scores)


def components(rows: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The component of each row that pairs make, int32 `[rows]`."""
    graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(rows, rows))
    return connected_components(graph, directed=False)[1]
