"""Filters on what the index knows of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.context import Context
from curation.steps.config import MetadataFilter


def metadata_filter(context: Context, step: MetadataFilter) -> Mapping[str, Any]:
    """Drop images that are too small or too long, or whose captions say too little; of several reasons the first."""
    table = context.corpus.table
    width, height = (table[name].to_numpy() for name in ("width", "height"))
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    words = _measure_captions(table["caption"], _words) if step.min_words else np.zeros(len(width))
    characters = _measure_captions(table["caption"], pc.utf8_length) if step.min_characters else words
    reasons = {
        "too_small": (shorter < step.min_side, shorter),
        "aspect_ratio": (longer > (step.max_aspect or np.inf) * shorter, longer / shorter),
        "too_few_words": (words < step.min_words, words),
        "too_few_characters": (characters < step.min_characters, characters),
    }
    return context.state.drop_by_reason(step.kind, reasons)


def _measure_captions(column: pa.ChunkedArray, measure: Callable[[pa.Array], pa.Array]) -> np.ndarray:
    """A number for each caption, a chunk at a time; images without one have an empty one."""
    parts = [measure(pc.fill_null(chunk, "")).to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts)


def _words(captions: pa.Array) -> pa.Array:
    trimmed = pc.utf8_trim_whitespace(captions)
    count = pc.list_value_length(pc.utf8_split_whitespace(trimmed))
    return pc.if_else(pc.equal(trimmed, ""), 0, count)
