"""Filters on what the index knows of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc

from curation.context import Context
from curation.steps.config import Filter


def filter_metadata(context: Context, step: Filter) -> Mapping[str, Any]:
    """Drop images that are too small or too long, or whose captions say too little; of several reasons the first."""
    table = context.corpus.table
    width, height = (table[name].to_numpy() for name in ("width", "height"))
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    caption = pc.fill_null(table["caption"], "")
    words = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(caption))).to_numpy()
    words = np.where(pc.equal(pc.utf8_trim_whitespace(caption), "").to_numpy(), 0, words)
    characters = pc.utf8_length(caption).to_numpy()
    reasons = {
        "too_small": (shorter < step.min_side, shorter),
        "too_long": (longer > (step.max_aspect or np.inf) * shorter, longer / shorter),
        "too_few_words": (words < step.min_words, words),
        "too_few_characters": (characters < step.min_characters, characters),
    }
    told = {}
    for reason, (bad, value) in reasons.items():
        rows = np.flatnonzero(bad & context.verdicts.keep)
        context.verdicts.drop(rows, step.kind, reason, -1, value[rows])
        told[reason] = len(rows)
    return {"dropped": sum(told.values()), **told}
