"""Scores with intervals."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Score:
    """One line of a report: a share of correct answers and its 95 % bootstrap interval, all 0 to 1."""

    protocol: str
    subject: str
    value: float
    low: float
    high: float
    images: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def accuracy(protocol: str, subject: str, correct: np.ndarray, resamples: int, seed: int) -> Score:
    """Score a bool array of answers.

    Resampling n answers with replacement and averaging them is a binomial draw, so that is what is drawn.
    """
    n, share = len(correct), float(correct.mean())
    means = np.random.Generator(np.random.Philox(seed)).binomial(n, share, resamples) / n
    low, high = (float(each) for each in np.percentile(means, [2.5, 97.5]))
    return Score(protocol, subject, share, low, high, n)
