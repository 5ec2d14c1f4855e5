"""Whether a backbone is better than its baselines: the gain over the better one of each protocol, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eval.stats.scores import paired_interval

MODEL = "model"
_REMEDY = (
    "Train for more steps or on more images, try another recipe (fovea recipes), or start from public weights "
    "(fovea import, --init-from)"
)


@dataclass(frozen=True)
class Gain:
    """The difference between a backbone's headline and that of the better baseline, by one protocol."""

    protocol: str
    value: float
    baseline: str
    """Name of the better baseline."""
    baseline_value: float
    low: float | None
    """Bounds of the 95 % interval of the difference, over the test images that both answered; None where the protocol
    has no answer for each image."""
    high: float | None

    @property
    def gain(self) -> float:
        return self.value - self.baseline_value

    @property
    def is_significant(self) -> bool:
        """Whether the backbone is better beyond what chance explains."""
        return self.gain > 0 if self.low is None else self.low > 0

    @property
    def describe(self) -> str:
        interval = (
            "" if self.low is None or self.high is None else f" ({100 * self.low:+.1f} to {100 * self.high:+.1f})"
        )
        return f"{self.protocol} {100 * self.gain:+.1f} points over {self.baseline}{interval}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compute_gains(headlines: Sequence[Mapping[str, Any]], answers: Mapping[tuple[str, str], np.ndarray]) -> list[Gain]:
    """The gain of each protocol that scores a share for which higher is better, and a baseline.

    Args:
        headlines: first row of each protocol and name.
        answers: by protocol and name, of each test image whether the answer is right, bool `[n]`.
    """
    found = []
    for protocol in dict.fromkeys(row["protocol"] for row in headlines):
        rows = {row["model"]: row for row in headlines if row["protocol"] == protocol}
        model, baselines = rows.pop(MODEL, None), list(rows.values())
        if model is None or not baselines or not model["is_fraction"] or model["better"] != "higher":
            continue
        best = max(baselines, key=lambda row: row["value"])
        ours, theirs = (answers.get((protocol, name)) for name in (MODEL, best["model"]))
        low, high = (None, None) if ours is None or theirs is None else paired_interval(ours, theirs)
        found.append(Gain(protocol, model["value"], best["model"], best["value"], low, high))
    return found


SAME_IMAGES = "Says nothing: train and test are the same images. Give test images that train does not hold."
"""The verdict where all answers would be looked up."""


def describe_verdict(found: Sequence[Gain]) -> str:
    """The gains in a sentence or two, and what to try where they do not show; empty without a baseline."""
    if not found:
        return ""
    listed = "; ".join(each.describe for each in found)
    shown = [each.protocol for each in found if each.is_significant]
    if len(shown) == len(found):
        return f"Better than its baselines: {listed}."
    if not shown:
        return f"No better than its baselines: {listed}. {_REMEDY}."
    others = ", ".join(each.protocol for each in found if not each.is_significant)
    return f"Better than its baselines by {', '.join(shown)}, not by {others}: {listed}. {_REMEDY}."
