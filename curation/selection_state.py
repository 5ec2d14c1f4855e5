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

from infra.corpus.arrow import take_chunked
from infra.corpus.selection import SCHEMA, Selection
from infra.storage.atomic import atomic_write

KEPT = "kept"
CORPUS = 0
"""Number of the corpus itself among what images are compared with."""
MERGES = ("exact_duplicate", "perceptual_duplicate", "near_duplicate")
"""Reasons of those that another stands for"""
_NO_MATCH = -1
_ROWS = 1 << 20


@dataclass
class Vocabulary:
    """Words in place of which numbers stand."""

    words: list[str]

    def number(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def column(self, numbers: np.ndarray) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(self.words)).cast(pa.string())


@dataclass
class SelectionState:
    """One entry a sample, in the corpus's order, some 30 bytes each; keys stay where they are until the ledger."""

    keys: pa.ChunkedArray
    keep: np.ndarray
    step: np.ndarray
    reason: np.ndarray
    matched: np.ndarray
    """Row in what is numbered by `source`"""
    source: np.ndarray
    score: np.ndarray
    representative: np.ndarray
    """Row that stands for this one"""
    weight: np.ndarray
    steps: Vocabulary
    reasons: Vocabulary
    references: list[pa.ChunkedArray] = field(default_factory=list)
    """Keys of what images are compared with, the corpus first"""

    @classmethod
    def keep_all(cls, keys: pa.ChunkedArray) -> SelectionState:
        """Everything kept, each image standing for itself."""
        n = len(keys)
        return cls(
            keys=keys,
            keep=np.ones(n, dtype=bool),
            step=np.zeros(n, dtype=np.int8),
            reason=np.zeros(n, dtype=np.int8),
            matched=np.full(n, _NO_MATCH),
            source=np.zeros(n, dtype=np.int8),
            score=np.full(n, np.nan, dtype=np.float32),
            representative=np.arange(n),
            weight=np.ones(n, dtype=np.float32),
            steps=Vocabulary([""]),
            reasons=Vocabulary([KEPT]),
            references=[keys],
        )

    @classmethod
    def from_selection(cls, selection: Selection) -> SelectionState:
        """Where an earlier selection ended."""
        ledger = selection.ledger
        state = cls.keep_all(ledger["key"])
        state.keep = ledger["keep"].to_numpy().copy()
        state.score, state.weight = (ledger[name].to_numpy().copy() for name in ("score", "weight"))
        for name, names in (("step", state.steps), ("reason", state.reasons)):
            found = ledger[name].cast(pa.large_string()).combine_chunks().dictionary_encode()
            numbers = np.array([names.number(word) for word in found.dictionary.to_pylist()], dtype=np.int8)
            setattr(state, name, numbers[found.indices.to_numpy()])
        winners = ledger["matched_key"].cast(pa.large_string()).combine_chunks().dictionary_encode()
        state.references.append(pa.chunked_array([winners.dictionary]))  # whatever they were compared with
        state.matched = pc.fill_null(winners.indices, _NO_MATCH).to_numpy().astype(np.int64)
        state.source = np.where(state.matched == _NO_MATCH, CORPUS, len(state.references) - 1).astype(np.int8)
        state.representative = np.argsort(state.ranks)[ledger["duplicate_group"].to_numpy()]
        state._restore_direct_matches(winners.dictionary)
        return state

    def _restore_direct_matches(self, matched: pa.Array) -> None:
        """Say again who each row lost to directly; the ledger's cluster tells only who stands for it in the end."""
        merged = np.isin(
            self.reason, [self.reasons.number(reason) for reason in MERGES if reason in self.reasons.words]
        )
        rows = pc.fill_null(pc.index_in(matched, self.keys.cast(matched.type)), _NO_MATCH).to_numpy()
        direct = rows[self.matched[merged]]
        self.representative[merged] = np.where(direct >= 0, direct, self.representative[merged])

    @cached_property
    def ranks(self) -> np.ndarray:
        """Place of each key among all keys in order, int64: what does not depend on the order of shards."""
        return pc.rank(self.keys, tiebreaker="first").to_numpy().astype(np.int64) - 1

    def kept_rows(self) -> np.ndarray:
        """Rows still kept, int64, rising."""
        return np.flatnonzero(self.keep)

    def sort_by_key(self, rows: np.ndarray) -> np.ndarray:
        """Rows by rising key."""
        return rows[np.argsort(self.ranks[rows])]

    def reference(self, keys: pa.ChunkedArray) -> int:
        """Number of another set of keys, of which winners may be rows."""
        self.references.append(keys)
        return len(self.references) - 1

    def drop(
        self, rows: np.ndarray, step: str, reason: str, matched: np.ndarray | int, scores: np.ndarray | float,
        source: int | np.ndarray = CORPUS,
    ) -> None:  # fmt: skip
        """Drop rows, saying what each lost against: rows of the corpus, or of another `source`; -1 for nothing."""
        self.keep[rows] = False
        self.record(rows, step, reason, matched, scores, source)

    def record(
        self, rows: np.ndarray, step: str, reason: str, matched: np.ndarray | int, scores: np.ndarray | float,
        source: int | np.ndarray = CORPUS,
    ) -> None:  # fmt: skip
        """Say of rows why they are kept or dropped."""
        self.step[rows], self.reason[rows] = self.steps.number(step), self.reasons.number(reason)
        self.matched[rows], self.source[rows], self.score[rows] = matched, source, scores

    def drop_undecodable(self, reasons: Mapping[int, str]) -> None:
        """Drop rows whose images could not be decoded when they were embedded, for the reasons of the decoder."""
        for reason in sorted(set(reasons.values())):
            rows = np.array([row for row, each in reasons.items() if each == reason and self.keep[row]], dtype=np.int64)
            self.drop(rows, "embed", reason, _NO_MATCH, np.nan)

    def drop_by_reason(self, step: str, reasons: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, int]:
        """Drop kept rows for reasons, each with whom it meets, bool, and a score of all rows; of several the first.

        Returns:
            how many were dropped in all and for each reason.
        """
        told = {}
        for reason, (bad, value) in reasons.items():
            rows = np.flatnonzero(bad & self.keep)
            self.drop(rows, step, reason, _NO_MATCH, value[rows])
            told[reason] = len(rows)
        return {"dropped": sum(told.values()), **told}

    def merge(
        self, losers: np.ndarray, matched: np.ndarray, step: str, reason: str, scores: np.ndarray | float
    ) -> None:
        """Drop copies in favor of others, which stand for them from now on."""
        self.drop(losers, step, reason, matched, scores)
        np.add.at(self.weight, matched, self.weight[losers])
        self.representative[losers] = matched

    def to_table(self) -> pa.Table:
        """The columns of a selection."""
        clusters = self.ranks[self.last_representatives()]
        starts = range(0, len(self.keys), _ROWS)
        return pa.concat_tables([self._table_of_rows(slice(start, start + _ROWS), clusters) for start in starts])

    def _table_of_rows(self, rows: slice, clusters: np.ndarray) -> pa.Table:
        """Few enough rows for Arrow's strings, which have room for 2 GiB in an array."""
        columns = {
            "key": self.keys.slice(rows.start, _ROWS),
            "keep": pa.array(self.keep[rows]),
            "step": self.steps.column(self.step[rows]),
            "reason": self.reasons.column(self.reason[rows]),
            "matched_key": self._matched_keys(rows),
            "score": pa.array(self.score[rows]),
            "duplicate_group": pa.array(clusters[rows]),
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

    def _matched_keys(self, rows: slice) -> pa.Array:
        winner, source = self.matched[rows], self.source[rows]
        column = pa.nulls(len(winner), pa.string())
        for number, keys in enumerate(self.references):
            there = (source == number) & (winner != _NO_MATCH)
            if there.any():
                names = take_chunked(keys, winner[there]).cast(pa.string())
                column = pc.replace_with_mask(column, pa.array(there), names)
        return column

    def save(self, path: Path, facts: list[dict[str, Any]]) -> None:
        """Write what later steps go on from, and what earlier ones told."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        words = {name: np.array(getattr(self, name).words) for name in ("steps", "reasons")}
        with atomic_write(path) as partial, partial.open("wb") as file:
            np.savez(file, facts=np.array(json.dumps(facts)), **arrays, **words)  # type: ignore[arg-type]

    def restore(self, path: Path) -> list[dict[str, Any]]:
        """Go on from what was saved; return what earlier steps told."""
        with np.load(path, allow_pickle=False) as file:
            for name in _ARRAYS:
                setattr(self, name, file[name])
            self.steps, self.reasons = (Vocabulary(file[name].tolist()) for name in ("steps", "reasons"))
            return json.loads(str(file["facts"]))


_ARRAYS = ("keep", "step", "reason", "matched", "source", "score", "representative", "weight")
