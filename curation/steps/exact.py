"""Exact duplicates, by content hash."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from curation.context import Context
from curation.steps.config import Exact
from infra.corpus.arrow import sha256_prefixes


def exact(context: Context, step: Exact) -> Mapping[str, Any]:
    """Of the kept images with the same bytes, keep the one whose key comes first."""
    verdicts = context.state
    rows = verdicts.kept_rows()
    high, low = sha256_prefixes(context.corpus.table["sha256"])[rows].T
    order = np.lexsort((verdicts.ranks[rows], low, high))
    rows, high, low = rows[order], high[order], low[order]
    begins = np.concatenate([[True], (high[1:] != high[:-1]) | (low[1:] != low[:-1])])
    winners = rows[begins][np.cumsum(begins) - 1]
    verdicts.merge(rows[~begins], winners[~begins], step.kind, "exact_duplicate", 1.0)
    return {"dropped": int((~begins).sum())}
