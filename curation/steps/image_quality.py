"""Drops blank and blurred images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from curation.context import Context
from curation.image_stats import ImageStats
from curation.steps.config import ImageQuality
from infra.artifacts.artifact import cache_directory


def image_quality(context: Context, step: ImageQuality) -> Mapping[str, Any]:
    """Drop images on which there is next to nothing to be seen; of several reasons the first."""
    stats = read_stats(context, ["entropy", "sharpness"])
    entropy, sharpness = (stats[name].to_numpy(zero_copy_only=False) for name in ("entropy", "sharpness"))
    reasons = {
        "blank": (entropy < step.min_entropy, entropy),
        "blurred": (sharpness < step.min_sharpness, sharpness),
        "undecodable": (np.isnan(entropy), entropy),
    }
    return context.state.drop_by_reason(step.kind, reasons)


def read_stats(context: Context, columns: list[str]) -> pa.Table:
    """Some image statistics of the whole corpus, a row for each image."""
    return ImageStats(context.corpus, cache_directory() / "image_stats").table(
        context.cores, context.report_progress, columns
    )
