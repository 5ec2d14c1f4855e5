"""The most similar of a few vectors for each of many, and the k most similar of many for each of a few."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from curation.similarity.exact import dots, is_zero, pair_dots, rounding_error
from curation.similarity.tiles import Tiles, WorkerPool
from infra.compute.sharded_array import ShardedArray

_BLOCK = 1 << 12
_QUERIES = 1 << 9
_WIDE = 1 << 13
_SPARE = 8  # candidates beyond those wanted: so many may be as similar as the last without a second look


@dataclass(frozen=True)
class BestMatches:
    """Rows with the most similar one of others, exactly; float64 scores."""

    rows: np.ndarray
    others: np.ndarray
    scores: np.ndarray


def argmax_above(
    vectors: ShardedArray, rows: np.ndarray, others: ShardedArray, least: float, workers: WorkerPool
) -> BestMatches:
    """For each of `rows` the most similar of `others`, where there is one of at least that similarity.

    All are compared. Of equally similar ones the first counts. A zero vector is like nothing.
    """
    if not len(rows) or not len(others):
        return BestMatches(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0))
    parts = [_best_of_part(vectors, rows, others, start, least, workers) for start in range(0, len(others), _WIDE)]
    found, other, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
    order = np.lexsort((other, -scores, found))
    found, other, scores = found[order], other[order], scores[order]
    first = np.diff(found, prepend=-1) != 0
    return BestMatches(found[first], other[first], scores[first])


def _best_of_part(
    vectors: ShardedArray, rows: np.ndarray, others: ShardedArray, begin: int, least: float, workers: WorkerPool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    wanted = others.take(np.arange(begin, min(begin + _WIDE, len(others))))
    held, doubt = workers.tiles.load(wanted), rounding_error(vectors.dim)

    def block(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mine = rows[start : start + _BLOCK]
        taken = vectors.take(mine)
        mine, taken = mine[~is_zero(taken)], taken[~is_zero(taken)]
        a, b, scores = workers.tiles.find_near_best(workers.tiles.load(taken), held, 2 * doubt)
        likely = scores >= least - doubt
        a, b = a[likely], b[likely]
        exact = pair_dots(taken, wanted, a, b)
        sure = exact >= least
        return mine[a[sure]], b[sure] + begin, exact[sure]

    found = list(workers.map(block, range(0, len(rows), _BLOCK)))
    rows_, others_, scores_ = (np.concatenate(each) for each in zip(*found, strict=True))
    return rows_, others_, scores_


def k_nearest(
    queries: np.ndarray, vectors: ShardedArray, rows: np.ndarray, k: int, workers: WorkerPool
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar of `rows` for each query, exactly, all being compared.

    Args:
        queries: float16 `[q, dim]`.

    Returns:
        places in `rows`, int64 `[q, k]`, and similarities, float64 `[q, k]`, falling; of equal ones the first place
        comes first. k is at most the number of rows. A zero vector, which is like nothing, has places -1.
    """
    k = min(k, len(rows))
    blocks = (queries[start : start + _QUERIES] for start in range(0, len(queries), _QUERIES))
    found = list(workers.map(lambda block: _k_of_block(block, vectors, rows, k, workers.tiles), blocks))
    places, scores = (np.concatenate(each) for each in zip(*found, strict=True))
    nothing = is_zero(queries)
    places[nothing], scores[nothing] = -1, -np.inf
    return places, scores


def _k_of_block(
    queries: np.ndarray, vectors: ShardedArray, rows: np.ndarray, k: int, tiles: Tiles
) -> tuple[np.ndarray, np.ndarray]:
    """The rough k-th similarity tells which rows may be among the k; these are compared exactly."""
    held, doubt = tiles.load(queries), rounding_error(vectors.dim)
    rough: np.ndarray = np.empty((len(queries), 0), dtype=np.float32)
    places: np.ndarray = np.empty((len(queries), 0), dtype=np.int64)
    most = k + _SPARE
    for start in range(0, len(rows), _WIDE):
        others = tiles.load(vectors.take(rows[start : start + _WIDE]))
        found, scores = tiles.find_highest(held, others, min(most, len(others)))
        places, rough = np.hstack([places, found + start]), np.hstack([rough, scores])
        if places.shape[1] > most:
            chosen = np.argpartition(-rough, most - 1, axis=1)[:, :most]
            places, rough = (np.take_along_axis(each, chosen, axis=1) for each in (places, rough))
    found, exact = rank_candidates(queries, vectors, rows, places, k)
    if places.shape[1] < len(rows):  # what was passed over is at most as similar as the least here, but for rounding
        tied = np.flatnonzero((exact[:, -1] <= rough.min(axis=1) + 2 * doubt) & ~is_zero(queries))
        for query in tied.tolist():
            found[query], exact[query] = _k_with_ties(queries[query], vectors, rows, k, exact[query, -1], tiles)
    return found, exact


def _k_with_ties(
    query: np.ndarray, vectors: ShardedArray, rows: np.ndarray, k: int, least: float, tiles: Tiles
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar rows of one query, of which many are as similar as the last: at least `least`."""
    held, doubt = tiles.load(query[None]), rounding_error(vectors.dim)
    places: np.ndarray = np.empty(0, dtype=np.int64)
    scores: np.ndarray = np.empty(0)
    for start in range(0, len(rows), _WIDE):
        others = vectors.take(rows[start : start + _WIDE])
        zero, near, _ = tiles.find_above(held, tiles.load(others), least - doubt)
        places = np.concatenate([places, near + start])
        scores = np.concatenate([scores, pair_dots(query[None], others, zero, near)])
        order = np.lexsort((places, -scores))[:k]
        places, scores = places[order], scores[order]
    return places, scores


def rank_candidates(
    queries: np.ndarray, vectors: ShardedArray, rows: np.ndarray, candidates: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar of each query's candidates, places in `rows` (-1 for none), compared exactly."""
    scores = np.column_stack([dots(queries, vectors.take(rows[np.maximum(column, 0)])) for column in candidates.T])
    scores[candidates < 0] = -np.inf
    order = np.lexsort((candidates, -scores), axis=1)[:, :k]
    return np.take_along_axis(candidates, order, axis=1), np.take_along_axis(scores, order, axis=1)


def similarities(vectors: ShardedArray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of pairs of rows, exactly; float64 `[m]`."""
    starts = range(0, len(rows), _BLOCK)
    parts = [dots(*(vectors.take(each[start : start + _BLOCK]) for each in (rows, others))) for start in starts]
    return np.concatenate(parts) if parts else np.empty(0)
