"""Skips steps with a bad loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pretrain.config import Guards
from pretrain.monitoring.metrics_log import SKIPPED

_WINDOW = 200  # steps whose losses say what is usual
_MIN_STEPS = 50
_PLATEAU = 5  # high losses in a row that are no spike: the level has changed


def spike_limit(rows: Sequence[Mapping[str, float]], guards: Guards) -> float:
    """The loss above which the next step is skipped, from the steps so far."""
    usual = [row["loss"] for row in rows[-_WINDOW:] if SKIPPED not in row]
    high = count_consecutive_skips(rows)
    lasting = high >= _PLATEAU and all("loss" in row for row in rows[-high:])
    if guards.loss_spike_threshold is None or len(usual) < _MIN_STEPS or lasting:
        return math.inf
    middle = statistics.median(usual)
    deviation = statistics.fmean(abs(loss - middle) for loss in usual)
    return middle + guards.loss_spike_threshold * max(deviation, 1e-3 * abs(middle))


def nan_if_spike(loss: Tensor, limit: float) -> Tensor:
    """1 for a usual loss, NaN for another: a factor that makes every rank's gradient NaN, and so the step skipped.

    It stays on the device, so that the backward pass does not wait for the loss.
    """
    usual = torch.isfinite(loss) & (loss <= limit)
    return torch.where(usual, torch.ones_like(loss), torch.full_like(loss, torch.nan))


def count_consecutive_skips(rows: Sequence[Mapping[str, float]]) -> int:
    count = 0
    while count < len(rows) and SKIPPED in rows[-1 - count]:
        count += 1
    return count
