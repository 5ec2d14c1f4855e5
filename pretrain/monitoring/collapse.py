"""Whether what is learned has collapsed: measured now and then, compared with thresholds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pretrain.config import Collapse

PREFIX = "collapse_"
_RANK, USAGE, DIVERGENCE = "rank", "usage", "kl"
RANK = PREFIX + _RANK


def drop_unmeasured(row: Mapping[str, float]) -> dict[str, float]:
    """A row without what of health could not be told."""
    return {name: value for name, value in row.items() if not name.startswith(PREFIX) or math.isfinite(value)}


def find_alarms(row: Mapping[str, float], collapse: Collapse) -> list[str]:
    """What of a step's telemetry looks like collapse."""
    found = []
    for name, value in row.items():
        floor = _floor(name, collapse)
        if floor is not None and value < floor:
            found.append(f"{name.removeprefix(PREFIX)} {value:.3g} is below {floor:g}")
    return found


def _floor(name: str, collapse: Collapse) -> float | None:
    if not name.startswith(PREFIX):
        return None
    return {_RANK: collapse.min_rank, USAGE: collapse.min_usage, DIVERGENCE: collapse.min_kl}.get(
        name.rsplit("_", 1)[-1]
    )


def count_consecutive_alarms(rows: Sequence[Mapping[str, float]], collapse: Collapse) -> int:
    """How many looks in a row, up to the last step, gave alarm."""
    count = 0
    for row in reversed(rows):
        if not any(name.startswith(PREFIX) for name in row):
            continue
        if not find_alarms(row, collapse):
            break
        count += 1
    return count
