"""The verdicts on a corpus while curation steps work on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.columns import taken
from infra.files import appearing
from infra.selections import SCHEMA, Selection

KEPT = "kept"
CORPUS = 0
"""Number of the corpus itself among what images are compared with."""
MERGES = ("exact_duplicate", "perceptual_duplicate", "near_duplicate")
"""Reasons of those that another stands for"""
_NOBODY = -1
_ROWS = 1 << 20


@dataclass
class Names:
    """Words in place of which numbers stand."""

    words: list[str]

    def number(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def column(self, numbers: np.ndarray) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(self.words)).cast(pa.string())


@dataclass
class Verdicts:
    """One entry a sample, in the corpus's order, some 30 bytes each; keys stay where they are until the ledger."""

    keys: pa.ChunkedArray
    keep: np.ndarray
    step: np.ndarray
    reason: np.ndarray
    winner: np.ndarray
    """Row in what is numbered by `source`"""
    source: np.ndarray
    score: np.ndarray
    representative: np.ndarray
    """Row that stands for this one"""
    weight: np.ndarray
    steps: Names
    reasons: Names
    references: list[pa.ChunkedArray] = field(default_factory=list)
    """Keys of what images are compared with, the corpus first"""

    @classmethod
    def initial(cls, keys: pa.ChunkedArray) -> Verdicts:
        """Everything kept, each image standing for itself."""
        n = len(keys)
        return cls(
            keys=keys,
            keep=np.ones(n, dtype=bool),
            step=np.zeros(n, dtype=np.int8),
            reason=np.zeros(n, dtype=np.int8),
            winner=np.full(n, _NOBODY),
            source=np.zeros(n, dtype=np.int8),
            score=np.full(n, np.nan, dtype=np.float32),
            representative=np.arange(n),
            weight=np.ones(n, dtype=np.float32),
            steps=Names([""]),
            reasons=Names([KEPT]),
            references=[keys],
        )

    @classmethod
    def after(cls, selection: Selection) -> Verdicts:
        """Where an earlier selection ended."""
        ledger = selection.ledger
        state = cls.initial(ledger["key"])
        state.keep = ledger["keep"].to_numpy().copy()
        state.score, state.weight = (ledger[name].to_numpy().copy() for name in ("score", "weight"))
        for name, names in (("step", state.steps), ("reason", state.reasons)):
            found = ledger[name].cast(pa.large_string()).combine_chunks().dictionary_encode()
            numbers = np.array([names.number(word) for word in found.dictionary.to_pylist()], dtype=np.int8)
            setattr(state, name, numbers[found.indices.to_numpy()])
        winners = ledger["winner"].cast(pa.large_string()).combine_chunks().dictionary_encode()
        state.references.append(pa.chunked_array([winners.dictionary]))  # whatever they were compared with
        state.winner = pc.fill_null(winners.indices, _NOBODY).to_numpy().astype(np.int64)
        state.source = np.where(state.winner == _NOBODY, CORPUS, len(state.references) - 1).astype(np.int8)
        state.representative = np.argsort(state.ranks)[ledger["cluster"].to_numpy()]
        state._recall_merges(winners.dictionary)
        return state

    def _recall_merges(self, winners: pa.Array) -> None:
        """Say again who each row lost to directly; the ledger's cluster tells only who stands for it in the end."""
        merged = np.isin(
            self.reason, [self.reasons.number(reason) for reason in MERGES if reason in self.reasons.words]
        )
        rows = pc.fill_null(pc.index_in(winners, self.keys.cast(winners.type)), _NOBODY).to_numpy()
        direct = rows[self.winner[merged]]
        self.representative[merged] = np.where(direct >= 0, direct, self.representative[merged])

    @cached_property
    def ranks(self) -> np.ndarray:
        """Place of each key among all keys in order, int64: what does not depend on the order of shards."""
        return pc.rank(self.keys, tiebreaker="first").to_numpy().astype(np.int64) - 1

    def kept(self) -> np.ndarray:
        """Rows still kept, int64, rising."""
        return np.flatnonzero(self.keep)

    def in_order(self, rows: np.ndarray) -> np.ndarray:
        """Rows by rising key."""
        return rows[np.argsort(self.ranks[rows])]

    def reference(self, keys: pa.ChunkedArray) -> int:
        """Number of another set of keys, of which winners may be rows."""
        self.references.append(keys)
        return len(self.references) - 1

    def drop(
        self, rows: np.ndarray, step: str, reason: str, winners: np.ndarray | int, scores: np.ndarray | float,
        source: int | np.ndarray = CORPUS,
    ) -> None:  # fmt: skip
        """Drop rows, saying what each lost against: rows of the corpus, or of another `source`; -1 for nothing."""
        self.keep[rows] = False
        self.note(rows, step, reason, winners, scores, source)

    def note(
        self, rows: np.ndarray, step: str, reason: str, winners: np.ndarray | int, scores: np.ndarray | float,
        source: int | np.ndarray = CORPUS,
    ) -> None:  # fmt: skip
        """Say of rows why they are kept or dropped."""
        self.step[rows], self.reason[rows] = self.steps.number(step), self.reasons.number(reason)
        self.winner[rows], self.source[rows], self.score[rows] = winners, source, scores

    def drop_undecodable(self, reasons: Mapping[int, str]) -> None:
        """Drop rows whose images could not be decoded when they were embedded, for the reasons of the decoder."""
        for reason in sorted(set(reasons.values())):
            rows = np.array([row for row, each in reasons.items() if each == reason and self.keep[row]], dtype=np.int64)
            self.drop(rows, "embed", reason, _NOBODY, np.nan)

    def drop_each(self, step: str, reasons: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, int]:
        """Drop kept rows for reasons, each with whom it meets, bool, and a score of all rows; of several the first.

        Returns:
            how many were dropped in all and for each reason.
        """
        told = {}
        for reason, (bad, value) in reasons.items():
            rows = np.flatnonzero(bad & self.keep)
            self.drop(rows, step, reason, _NOBODY, value[rows])
            told[reason] = len(rows)
        return {"dropped": sum(told.values()), **told}

    def merge(
        self, losers: np.ndarray, winners: np.ndarray, step: str, reason: str, scores: np.ndarray | float
    ) -> None:
        """Drop copies in favour of others, which stand for them from now on."""
        self.drop(losers, step, reason, winners, scores)
        np.add.at(self.weight, winners, self.weight[losers])
        self.representative[losers] = winners

    def ledger(self) -> pa.Table:
        """The columns of a selection."""
        clusters = self.ranks[self.last_representatives()]
        starts = range(0, len(self.keys), _ROWS)
        return pa.concat_tables([self._some(slice(start, start + _ROWS), clusters) for start in starts])

    def _some(self, rows: slice, clusters: np.ndarray) -> pa.Table:
        """Few enough rows for Arrow's strings, which have room for 2 GiB in an array."""
        columns = {
            "key": self.keys.slice(rows.start, _ROWS),
            "keep": pa.array(self.keep[rows]),
            "step": self.steps.column(self.step[rows]),
            "reason": self.reasons.column(self.reason[rows]),
            "winner": self._winners(rows),
            "score": pa.array(self.score[rows]),
            "cluster": pa.array(clusters[rows]),
            "weight": pa.array(self.weight[rows]),
        }
        return pa.table(columns).select(SCHEMA.names).cast(SCHEMA)

    def last_representatives(self) -> np.ndarray:
        """Who stands for each row in the end: representatives of one step may have lost in a later one."""
        found = self.representative
        while True:
            further = found[found]
            if np.array_equal(further, found):
                return found
            found = further

    def _winners(self, rows: slice) -> pa.Array:
        winner, source = self.winner[rows], self.source[rows]
        column = pa.nulls(len(winner), pa.string())
        for number, keys in enumerate(self.references):
            there = (source == number) & (winner != _NOBODY)
            if there.any():
                names = taken(keys, winner[there]).cast(pa.string())
                column = pc.replace_with_mask(column, pa.array(there), names)
        return column

    def save(self, path: Path, facts: list[dict[str, Any]]) -> None:
        """Write what later steps go on from, and what earlier ones told."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        words = {name: np.array(getattr(self, name).words) for name in ("steps", "reasons")}
        with appearing(path) as partial, partial.open("wb") as file:
            np.savez(file, facts=np.array(json.dumps(facts)), **arrays, **words)  # type: ignore[arg-type]

    def restore(self, path: Path) -> list[dict[str, Any]]:
        """Go on from what was saved; return what earlier steps told."""
        with np.load(path, allow_pickle=False) as file:
            for name in _ARRAYS:
                setattr(self, name, file[name])
            self.steps, self.reasons = (Names(file[name].tolist()) for name in ("steps", "reasons"))
            return json.loads(str(file["facts"]))


_ARRAYS = ("keep", "step", "reason", "winner", "source", "score", "representative", "weight")
