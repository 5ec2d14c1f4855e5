"""Which of several copies to keep."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from curation.context import Context
from curation.steps.config import NearDuplicates
from infra.errors import UserError


def preferred(context: Context, step: NearDuplicates, rows: np.ndarray) -> np.ndarray:
    """Places in `rows`, the best image first; ties go to the key that comes first."""
    table, ranks = context.corpus.table, context.verdicts.ranks[rows]
    if step.representative == "earliest":
        return np.argsort(ranks)
    if step.representative == "resolution":
        value = pixels(context, rows)
    elif step.representative == "bytes":
        value = table["image"].take(rows).combine_chunks().field("size").to_numpy().astype(np.float64)
    else:
        assert step.field is not None
        value = np.array([_value(each, step.prefer) for each in json_fields(context, rows, step.field)])
    return np.lexsort((ranks, -value))


def pixels(context: Context, rows: np.ndarray) -> np.ndarray:
    """Width times height of some images, float64 `[m]`."""
    taken = context.corpus.table.select(["width", "height"]).take(rows)
    return taken["width"].to_numpy().astype(np.float64) * taken["height"].to_numpy()


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


def number(field: Any) -> float | None:
    """A field as a number, if it is a finite one."""
    if isinstance(field, bool):
        return None
    try:
        found = float(field)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def json_fields(context: Context, rows: np.ndarray, field: str) -> list[Any]:
    """A field of each image's .json file; None where there is none.

    Raises:
        UserError: no image has it.
    """
    corpus, found = context.corpus, []
    for row in rows.tolist():
        entry = corpus.entry(row)
        place = next((each for each in entry["members"] if each["name"].endswith(".json")), None)
        content = corpus.read_range(entry["shard"], place["offset"], place["size"]) if place else b"null"
        found.append(_field(content, field))
    if len(found) and all(each is None for each in found):
        raise UserError(f"field: {field}: no image's .json has it; mend the step's field")
    return found


def _field(content: bytes, name: str) -> Any:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # from the web: anything may be in it
        return None
    return value.get(name) if isinstance(value, dict) else None
