"""Filters by a number that each image has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from curation import scorers
from curation.context import Context
from curation.steps.config import Score

_LEVELS = 41  # of the curve


def score(context: Context, step: Score) -> Mapping[str, Any]:
    """Drop images whose score is too low, too high or missing. All scores are kept as evidence."""
    rows = context.state.kept_rows()
    found = scorers.scores(context, step.scorer, rows)
    context.evidence("scores", pa.table({"row": rows, "score": found}))
    there = found[~np.isnan(found)]
    least = step.min if step.top is None else _least_of_top(there, step.top)
    all_scores = np.full(len(context.state.keep), np.nan, dtype=np.float64)
    all_scores[rows] = found
    reasons = {
        f"low_{step.name}": (all_scores < (-np.inf if least is None else least), all_scores),
        f"high_{step.name}": (all_scores > (np.inf if step.max is None else step.max), all_scores),
        f"no_{step.name}": (np.isnan(all_scores), all_scores),
    }
    told = context.state.drop_by_reason(step.kind, reasons)
    levels = np.unique(np.quantile(there, np.linspace(0, 1, _LEVELS))) if len(there) else np.empty(0)
    curve = [[float(level), int((there < level).sum())] for level in levels]
    return {**told, "least": least, "curve": curve}


def _least_of_top(found: np.ndarray, share: float) -> float | None:
    """The score of the last image of a share of the best, as DataComp counts (arXiv 2304.14108, its filters' code)."""
    if not len(found):
        return None
    return float(np.sort(found)[::-1][min(int(len(found) * share), len(found) - 1)])
