"""Fields of the images' .json files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from infra.corpus.arrow import take_chunked
from infra.corpus.corpus import Corpus
from infra.errors import UserError

_TOGETHER = 1024  # files read at a time


def read_json_fields(corpus: Corpus, rows: np.ndarray, field: str) -> list[Any]:
    """A field of each image's .json file; None where there is none.

    Raises:
        UserError: no image has it.
    """
    found = read_json_values(corpus, rows, field)
    if len(found) and all(each is None for each in found):
        raise UserError(f"field: {field}: no image's .json has it; fix the step's field")
    return found


def read_json_values(corpus: Corpus, rows: np.ndarray, *names: str) -> list[Any]:
    """Of each image's .json file the first field of some names that it has; None where there is none."""
    return [_field(content, names) for content in _read_jsons(corpus, rows)]


def _read_jsons(corpus: Corpus, rows: np.ndarray) -> Iterator[bytes | None]:
    """The content of each image's .json file; None where there is none."""
    table = corpus.table
    for start in range(0, len(rows), _TOGETHER):
        some = rows[start : start + _TOGETHER]
        shards, members = table["shard"].take(some).to_pylist(), take_chunked(table["members"], some).to_pylist()
        places = [next((each for each in names if each["name"].endswith(".json")), None) for names in members]
        wanted = [
            (shard, place["offset"], place["size"]) for shard, place in zip(shards, places, strict=True) if place
        ]  # fmt: skip
        contents = iter(corpus.read_ranges(wanted))
        yield from (next(contents) if place else None for place in places)


def _field(content: bytes | None, names: Sequence[str]) -> Any:
    if content is None:
        return None
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # from the web: anything may be in it
        return None
    return next((value[name] for name in names if name in value), None) if isinstance(value, dict) else None


def parse_number(field: Any) -> float | None:
    """A field as a number, if it is a finite one."""
    if isinstance(field, bool):
        return None
    try:
        found = float(field)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
