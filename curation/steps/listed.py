"""Steps by lists: what must go, and what may come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.context import Context
from curation.steps.config import Remove, Restore
from infra import storage
from infra.errors import UserError


def remove(context: Context, step: Remove) -> Mapping[str, Any]:
    """Drop what is listed, also what an earlier step has dropped: it must not come back."""
    table = context.corpus.table
    listed = np.zeros(len(context.corpus), dtype=bool)
    for path, column in ((step.keys, "key"), (step.hashes, "sha256")):
        if path is not None:
            listed |= _among(table[column], path)
    if step.prefix is not None:
        listed |= pc.starts_with(table["key"], step.prefix).to_numpy()
    rows = np.flatnonzero(listed)
    before = int(context.verdicts.keep.sum())
    context.verdicts.drop(rows, step.kind, "removed", -1, np.nan)
    return {"listed": len(rows), "dropped": before - int(context.verdicts.keep.sum())}


def restore(context: Context, step: Restore) -> Mapping[str, Any]:
    """Keep again what lost for a reason."""
    verdicts = context.verdicts
    if step.reason not in verdicts.reasons.words:
        known = ", ".join(sorted(set(verdicts.reasons.words) - {"kept"}))
        raise UserError(f"restore: reason: {step.reason}: nothing was dropped for it; reasons here are {known}")
    chosen = ~verdicts.keep & (verdicts.reason == verdicts.reasons.number(step.reason))
    chosen &= ~(verdicts.score >= step.below)
    if step.keys is not None:
        chosen &= _among(context.corpus.table["key"], step.keys)
    rows = np.flatnonzero(chosen)
    _leave_groups(context, rows)
    verdicts.keep[rows] = True
    verdicts.note(rows, step.kind, "restored", verdicts.winner[rows], verdicts.score[rows], verdicts.source[rows])
    return {"restored": len(rows)}


def _leave_groups(context: Context, rows: np.ndarray) -> None:
    """What is kept again stands for itself, and nobody else does."""
    verdicts = context.verdicts
    before = np.unique(verdicts.last_representatives()[rows])
    verdicts.representative[rows] = rows
    sizes = np.bincount(verdicts.last_representatives(), minlength=len(verdicts.weight))
    for each in (before, rows):
        verdicts.weight[each] = sizes[each]


def _among(column: pa.ChunkedArray, path: str) -> np.ndarray:
    """Where a column has one of a file's lines, bool."""
    lines = [line.strip() for line in storage.read_bytes(path).decode().splitlines()]
    return pc.is_in(column, pa.array([line for line in lines if line], pa.string())).to_numpy()
