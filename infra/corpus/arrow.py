"""Columns of many strings, a chunk at a time: Arrow puts no more than 2 GiB of them into one array."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def take_chunked(column: pa.ChunkedArray, rows: np.ndarray) -> pa.Array:
    """Some rows of a column of strings, in their order; Arrow's own `take` would join all chunks first."""
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    chunk = np.searchsorted(ends, rows, side="right")
    order = np.argsort(chunk, kind="stable")
    parts = []
    for number in np.unique(chunk):
        some = order[slice(*np.searchsorted(chunk[order], [number, number + 1]))]
        begin = int(ends[number]) - len(column.chunk(int(number)))
        parts.append(column.chunk(int(number)).take(pa.array(rows[some] - begin)))
    back = np.empty(len(rows), dtype=np.int64)
    back[order] = np.arange(len(rows))
    return pa.concat_arrays(parts).take(pa.array(back)) if parts else pa.array([], column.type)


def index_in(column: pa.ChunkedArray, among: pa.ChunkedArray) -> np.ndarray:
    """Where each string stands among others, int64; -1 where it does not."""
    positions = pc.index_in(column.cast(pa.large_string()), value_set=among.cast(pa.large_string()))
    return pc.fill_null(positions, -1).to_numpy().astype(np.int64)


_DIGITS = 32  # of a hexadecimal hash: 128 bits


def sha256_prefixes(column: pa.ChunkedArray) -> np.ndarray:
    """The first half of each hexadecimal SHA-256, uint64 `[n, 2]`: Python strings would take ten times as much."""
    prefixes = np.empty((len(column), _DIGITS // 2), dtype=np.uint8)
    start = 0
    for chunk in column.chunks:
        digits = np.array(chunk.to_pylist(), dtype="S64").view(np.uint8).reshape(-1, 64)[:, :_DIGITS]
        values = (digits & 15) + 9 * (digits >> 6)  # of 0-9 and a-f
        prefixes[start : start + len(chunk)] = values[:, ::2] << 4 | values[:, 1::2]
        start += len(chunk)
    return prefixes.view(">u8").astype(np.uint64)
