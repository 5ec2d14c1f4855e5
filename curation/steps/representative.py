"""Which of several copies to keep."""

from __future__ import annotations

from typing import Any

import numpy as np

from curation.context import Context
from curation.steps.config import NearDuplicates
from infra.corpus.arrow import take_chunked
from infra.corpus.json_metadata import parse_number, read_json_fields
from pretrain.data.decode import ImageRejected, decode, open_image, upright_size
from pretrain.data.images import depth_settings

_SIDE = 64  # pixels of the thumbnail that shows whether an image has colors
_SPREAD = 3  # mean range of the channels, of 255, above which it has: JPEG leaves some in gray images


def order_by_preference(context: Context, step: NearDuplicates, rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Places in `rows`, the best image first.

    Args:
        groups: of each row the number of the group within which one stays.
    """
    if step.representative == "first_key":
        return np.argsort(context.state.ranks[rows])
    if step.representative == "resolution":
        value = count_pixels(context, rows)
    elif step.representative == "bytes":
        value = read_file_sizes(context, rows)
    else:
        assert step.field is not None
        value = np.array([_value(each, step.prefer) for each in read_json_fields(context.corpus, rows, step.field)])
    return sort_best_first(context, rows, groups, value)


def sort_best_first(context: Context, rows: np.ndarray, groups: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Places in `rows` by falling value; of equal ones of a group color before gray, then the larger file, which was
    compressed less, then the key that comes first."""
    colors = np.ones(len(rows))
    tied = _find_ties(groups, value)
    colors[tied] = [_is_color(context, row) for row in rows[tied].tolist()]
    return np.lexsort((context.state.ranks[rows], -read_file_sizes(context, rows), -colors, -value))


def _find_ties(groups: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Places of rows that share group and value with another one, int64, rising."""
    _, both, counts = np.unique(np.stack([groups, value]), axis=1, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[both.ravel()] > 1)


def _is_color(context: Context, row: int) -> bool:
    """Whether an image has colors; one that cannot be decoded counts as gray."""
    try:
        opened = open_image(context.corpus.read_image(row))
        small = decode(opened, max(min(upright_size(opened)) // _SIDE, 1), depth=depth_settings(context.corpus))
    except ImageRejected:
        return False
    small.thumbnail((_SIDE, _SIDE))
    return bool(np.ptp(np.asarray(small).astype(np.int16), axis=2).mean() > _SPREAD)


def read_file_sizes(context: Context, rows: np.ndarray) -> np.ndarray:
    """Bytes of the encoded images of some rows, float64 `[m]`."""
    return take_chunked(context.corpus.table["image"], rows).field("size").to_numpy().astype(np.float64)


def count_pixels(context: Context, rows: np.ndarray) -> np.ndarray:
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
    found = parse_number(field)
    return -np.inf if found is None else found
