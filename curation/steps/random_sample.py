"""Random images of a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from curation.context import Context
from curation.steps.config import RandomSample


def random_sample(context: Context, step: RandomSample) -> Mapping[str, Any]:
    """Keep some of what is kept, drawn by their keys."""
    rows = context.state.kept_rows()
    lost = np.setdiff1d(rows, context.shuffled(rows, step.count))
    context.state.drop(lost, step.kind, "not_sampled", -1, np.nan)
    return {"dropped": len(lost)}
