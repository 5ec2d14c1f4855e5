"""Which of several copies to keep."""

from __future__ import annotations

from typing import Any

import numpy as np

from curation.context import Context
from curation.steps.config import NearDuplicates
from infra.columns import taken
from infra.fields import json_fields, number


def preferred(context: Context, step: NearDuplicates, rows: np.ndarray) -> np.ndarray:
    """Places in `rows`, the best image first; ties go to the key that comes first."""
    table, ranks = context.corpus.table, context.verdicts.ranks[rows]
    if step.representative == "earliest":
        return np.argsort(ranks)
    if step.representative == "resolution":
        value = pixels(context, rows)
    elif step.representative == "bytes":
        value = taken(table["image"], rows).field("size").to_numpy().astype(np.float64)
    else:
        assert step.field is not None
        value = np.array([_value(each, step.prefer) for each in json_fields(context.corpus, rows, step.field)])
    return np.lexsort((ranks, -value))


def pixels(context: Context, rows: np.ndarray) -> np.ndarray:
    """Width times height of some images, float64 `[m]`."""
    sides = context.corpus.table.select(["width", "height"]).take(rows)
    return sides["width"].to_numpy().astype(np.float64) * sides["height"].to_numpy()


def first_of_each(labels: np.ndarray) -> np.ndarray:
    """For each place the first one with the same label, int64 `[m]`."""
    _, first, group = np.unique(labels, return_index=True, return_inverse=True)
    return first[group]


def _value(field: Any, prefer: list[str]) -> float:
    """Higher is better; what has no such field comes last."""
    if prefer:
        return -float(prefer.index(str(field)) if str(field) in prefer else len(prefer))
    found = number(field)
    return -np.inf if found is None else found
