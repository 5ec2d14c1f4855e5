"""Fields of the images' .json files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from infra.columns import taken
from infra.corpora import Corpus
from infra.errors import UserError

_TOGETHER = 1024  # files read at a time


def json_fields(corpus: Corpus, rows: np.ndarray, field: str) -> list[Any]:
    """A field of each image's .json file; None where there is none.

    Raises:
        UserError: no image has it.
    """
    found = [_field(content, field) for content in _jsons(corpus, rows)]
    if len(found) and all(each is None for each in found):
        raise UserError(f"field: {field}: no image's .json has it; mend the step's field")
    return found


def _jsons(corpus: Corpus, rows: np.ndarray) -> Iterator[bytes | None]:
    """The content of each image's .json file; None where there is none."""
    table = corpus.table
    for start in range(0, len(rows), _TOGETHER):
        some = rows[start : start + _TOGETHER]
        shards, members = table["shard"].take(some).to_pylist(), taken(table["members"], some).to_pylist()
        places = [next((each for each in names if each["name"].endswith(".json")), None) for names in members]
        wanted = [
            (shard, place["offset"], place["size"]) for shard, place in zip(shards, places, strict=True) if place
        ]  # fmt: skip
        contents = iter(corpus.read_ranges(wanted))
        yield from (next(contents) if place else None for place in places)


def _field(content: bytes | None, name: str) -> Any:
    if content is None:
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # from the web: anything may be in it
        return None
    return value.get(name) if isinstance(value, dict) else None


def number(field: Any) -> float | None:
    """A field as a number, if it is a finite one."""
    if isinstance(field, bool):
        return None
    try:
        found = float(field)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
