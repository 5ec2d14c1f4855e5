"""Balancing by captions (MetaCLIP, arXiv 2309.16671, section 3): what is told of often is kept less often."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from curation.context import Context
from curation.steps.config import Metaclip
from curation.steps.key_filters import read_lines
from infra.corpus.arrow import take_chunked
from infra.errors import UserError

_WORD = re.compile(r"\w+")
_ROWS = 1 << 14  # captions read at a time


def metaclip(context: Context, step: Metaclip) -> Mapping[str, Any]:
    """Keep an image by lot: surely if its caption has an entry that few have, the less likely the more have all."""
    rows = context.state.sort_by_key(context.state.kept_rows())
    entries = EntryMatcher(read_lines(step.entries))
    found = [entries.within(caption) for caption in _captions(context, rows)]
    counts = np.bincount(np.concatenate(found), minlength=len(entries))
    chance = keep_probabilities(found, counts, step.most)
    drawn = context.generator().random(len(rows)) < chance
    nothing = np.array([not len(each) for each in found], dtype=bool)
    context.state.drop(rows[nothing], step.kind, "no_metadata_match", -1, np.nan)
    lost = ~drawn & ~nothing
    context.state.drop(rows[lost], step.kind, "not_sampled", -1, chance[lost].astype(np.float32))
    return {
        "dropped": int((~drawn).sum()),
        "no_metadata_match": int(nothing.sum()),
        "entries": len(entries),
        "entries_found": int((counts > 0).sum()),
        "entries_above": int((counts > step.most).sum()),
    }


def keep_probabilities(found: list[np.ndarray], counts: np.ndarray, most: int) -> np.ndarray:
    """How likely each image is kept, float64: each of its entries draws for itself with t over its count."""
    lost = 1 - most / np.maximum(counts, most)
    return np.array([1 - np.prod(lost[each]) for each in found])


class EntryMatcher:
    """Words and phrases to be looked for in captions, in any case, whole words only.

    Raises:
        UserError: there is none.
    """

    def __init__(self, lines: list[str]) -> None:
        phrases = dict.fromkeys(phrase for phrase in (tuple(_words(line)) for line in lines) if phrase)
        if not phrases:
            raise UserError("balance_text: entries: no word in the file; give one word or phrase a line")
        self._numbers = {phrase: number for number, phrase in enumerate(phrases)}
        self._longest = max(len(phrase) for phrase in phrases)

    def __len__(self) -> int:
        return len(self._numbers)

    def within(self, caption: str) -> np.ndarray:
        """Numbers of the entries in a caption, each once, int32."""
        words = _words(caption)
        spans = (
            tuple(words[start : start + length])
            for start in range(len(words))
            for length in range(1, min(self._longest, len(words) - start) + 1)
        )
        return np.array(sorted({self._numbers[span] for span in spans if span in self._numbers}), dtype=np.int32)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _captions(context: Context, rows: np.ndarray) -> Iterator[str]:
    column = context.corpus.table["caption"]
    for start in range(0, len(rows), _ROWS):
        yield from (each or "" for each in take_chunked(column, rows[start : start + _ROWS]).to_pylist())
