"""Steps by lists and by lot: what must go, what may come back, and what happens to stay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.context import Context
from curation.steps.config import Exclude, Restore
from infra.errors import UserError
from infra.storage import filesystem

_HASH = re.compile("[0-9a-f]{64}")


def exclude(context: Context, step: Exclude) -> Mapping[str, Any]:
    """Drop what is listed, also what an earlier step has dropped: it must not come back."""
    table = context.corpus.table
    listed = np.zeros(len(context.corpus), dtype=bool)
    unknown = 0
    if step.keys is not None:
        unknown += _mark(listed, table["key"], read_lines(step.keys))
    if step.hashes is not None:
        unknown += _mark(listed, table["sha256"], _read_hashes(step.hashes))
    if step.prefix is not None:
        listed |= pc.starts_with(table["key"], step.prefix).to_numpy()
    rows = np.flatnonzero(listed)
    before = int(context.state.keep.sum())
    context.state.drop(rows, step.kind, "removed", -1, np.nan)
    return {"listed": len(rows), "dropped": before - int(context.state.keep.sum()), "unknown_lines": unknown}


def _mark(listed: np.ndarray, column: pa.ChunkedArray, lines: list[str]) -> int:
    """Mark the rows that are among some lines; return how many lines no row has."""
    values = pa.array(lines, pa.string())
    listed |= pc.is_in(column, values).to_numpy()
    return len(lines) - int(pc.sum(pc.is_in(values, column)).as_py() or 0)


def read_lines(path: str) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        UserError: it is no text.
    """
    try:
        text = filesystem.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; give one key or hash a line") from None
    return [line for line in (line.strip("\r") for line in text.split("\n")) if line]


def _read_hashes(path: str) -> list[str]:
    lines = [line.strip().lower() for line in read_lines(path)]
    bad = next((line for line in lines if not _HASH.fullmatch(line)), None)
    if bad is not None:
        raise UserError(f"{path}: {bad[:80]}: not a SHA-256 of 64 hexadecimal digits; fix the line")
    return lines


def restore(context: Context, step: Restore) -> Mapping[str, Any]:
    """Keep again what lost for a reason."""
    verdicts = context.state
    if step.reason not in verdicts.reasons.words:
        known = ", ".join(sorted(set(verdicts.reasons.words) - {"kept"}))
        raise UserError(f"restore: reason: {step.reason}: nothing was dropped for it; reasons here are {known}")
    chosen = ~verdicts.keep & (verdicts.reason == verdicts.reasons.number(step.reason))
    if step.below is not None:
        chosen &= verdicts.score < step.below
    if step.keys is not None:
        chosen &= pc.is_in(context.corpus.table["key"], pa.array(read_lines(step.keys), pa.string())).to_numpy()
    rows = np.flatnonzero(chosen)
    _leave_groups(context, rows)
    verdicts.keep[rows] = True
    verdicts.record(rows, step.kind, "restored", verdicts.matched[rows], verdicts.score[rows], verdicts.source[rows])
    return {"restored": len(rows)}


def _leave_groups(context: Context, rows: np.ndarray) -> None:
    """What is kept again stands for itself, and nobody else does."""
    verdicts = context.state
    before = np.unique(verdicts.last_representatives()[rows])
    verdicts.representative[rows] = rows
    sizes = np.bincount(verdicts.last_representatives(), minlength=len(verdicts.weight))
    for each in (before, rows):
        verdicts.weight[each] = sizes[each]
