"""Many vectors in float16 files, read in pieces so that memory is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

_DENSE = 0.25  # share of a stretch that is wanted from which it is read whole


def l2_normalize(rows: np.ndarray) -> np.ndarray:
    """Vectors `[n, dim]` set to unit length; zeros stay zeros."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class ShardedArray:
    """Rows of some `.npy` files, or of arrays in memory: float16 `[n, dim]` one after another."""

    parts: Sequence[Path | np.ndarray]

    @cached_property
    def _headers(self) -> list[tuple[np.dtype, tuple[int, ...], int]]:
        """Of each file dtype, shape and offset of the rows: read once, as Python 3.11 cannot parse them in threads
        (`SystemError: AST constructor recursion depth mismatch`)."""
        arrays = [
            part if isinstance(part, np.ndarray) else np.load(part, mmap_mode="r", allow_pickle=False)
            for part in self.parts
        ]
        return [(array.dtype, array.shape, getattr(array, "offset", 0)) for array in arrays]

    @cached_property
    def _lengths(self) -> list[int]:
        return [shape[0] for _, shape, _ in self._headers]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self._lengths)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    @cached_property
    def dim(self) -> int:
        return self._headers[0][1][1]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Some rows, in their order; float16 `[m, dim]`."""
        values = np.empty((len(rows), self.dim), dtype=np.float16)
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            return self._read_slice(int(rows[0]), int(rows[-1]) + 1, values)
        part = np.searchsorted(self._ends, rows, side="right")
        for number in np.unique(part):
            wanted = np.flatnonzero(part == number)
            values[wanted] = self._read_rows(int(number), rows[wanted] - self._start(int(number)))
        return values

    def _read_slice(self, start: int, stop: int, values: np.ndarray) -> np.ndarray:
        for number, length in enumerate(self._lengths):
            begin = self._start(number)
            low, high = max(start, begin), min(stop, begin + length)
            if low < high:
                values[low - start : high - start] = self._open_part(number)[low - begin : high - begin]
        return values

    def _read_rows(self, number: int, rows: np.ndarray) -> np.ndarray:
        low, high = int(rows.min()), int(rows.max()) + 1
        values = self._open_part(number)[low:high]
        if len(rows) > _DENSE * len(values):
            values = np.array(values)
        return values[rows - low]

    def _start(self, number: int) -> int:
        return int(self._ends[number]) - self._lengths[number]

    def _open_part(self, number: int) -> np.ndarray:
        part = self.parts[number]
        if isinstance(part, np.ndarray):
            return part
        dtype, shape, offset = self._headers[number]
        # Mapped anew each time: pages that stay mapped would count as memory of this process.
        return np.memmap(part, dtype, "r", offset, shape)
