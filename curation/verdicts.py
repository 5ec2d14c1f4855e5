"""The verdicts on a corpus while curation steps work on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from infra.selections import SCHEMA, Selection

KEPT = "kept"


@dataclass
class Verdicts:
    """One entry a sample, in the corpus's order; the columns of a selection as arrays."""

    keys: np.ndarray
    keep: np.ndarray
    step: np.ndarray
    reason: np.ndarray
    winner: np.ndarray
    score: np.ndarray
    cluster: np.ndarray
    weight: np.ndarray

    @classmethod
    def initial(cls, keys: list[str]) -> Verdicts:
        """Everything kept, each image standing for itself."""
        n = len(keys)
        return cls(
            keys=np.array(keys, dtype=object),
            keep=np.ones(n, dtype=bool),
            step=np.full(n, "", dtype=object),
            reason=np.full(n, KEPT, dtype=object),
            winner=np.full(n, None, dtype=object),
            score=np.full(n, np.nan, dtype=np.float32),
            cluster=np.arange(n),
            weight=np.ones(n, dtype=np.float32),
        )

    @classmethod
    def after(cls, selection: Selection) -> Verdicts:
        """Where an earlier selection ended."""
        columns = {name: selection.ledger[name].to_numpy(zero_copy_only=False).copy() for name in SCHEMA.names}
        return cls(keys=columns.pop("key"), **columns)

    def kept(self) -> np.ndarray:
        """Rows still kept, int64."""
        return np.flatnonzero(self.keep)

    def drop(self, rows: np.ndarray, step: str, reason: str, winners: np.ndarray, scores: np.ndarray) -> None:
        """Drop rows, saying what each lost against."""
        self.keep[rows] = False
        self.note(rows, step, reason, winners, scores)

    def note(self, rows: np.ndarray, step: str, reason: str, winners: np.ndarray, scores: np.ndarray) -> None:
        """Say of rows why they are kept or dropped."""
        self.step[rows], self.reason[rows] = step, reason
        self.winner[rows], self.score[rows] = winners, scores

    def ledger(self) -> pa.Table:
        arrays = [pa.array(getattr(self, "keys" if name == "key" else name)) for name in SCHEMA.names]
        return pa.Table.from_arrays(arrays, names=SCHEMA.names).cast(SCHEMA)
