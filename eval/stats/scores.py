"""Scores with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from eval.stats.rng import make_rng

_PERCENTILES = (2.5, 97.5)
_RESAMPLES = 10_000  # of answers to the same questions
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Score:
    """One line of a report."""

    protocol: str
    metric: str
    """`accuracy`, `mIoU`, ..."""
    model: str
    """`model`, or a baseline."""
    value: float
    """0 to 1 for shares, else in the metric's unit."""
    low: float | None
    """Of the 95 % interval; None where there is none"""
    high: float | None
    images: int
    is_fraction: bool = True
    """Whether it is a share, shown in percent"""
    better: Better = "higher"
    leaked: int = 0
    """Of the images those that were seen in training, or near-duplicates of such"""
    without_leaks: float | None = None
    """The value on the other images"""
    note: str = ""
    chance: float | None = None
    """What guessing gets; None where that is not known"""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ProtocolResult:
    """What a protocol says of one backbone; its first score is the headline."""

    scores: list[Score]
    pictures: dict[str, bytes] = field(default_factory=dict)
    """PNG by name."""
    answers: np.ndarray | None = None
    """Of each test image whether the headline's answer is right, bool `[n]`; None where it is no mean of such."""


@dataclass(frozen=True)
class Scorer:
    """Makes the scores of one protocol and backbone."""

    protocol: str
    model: str
    resamples: int
    """Of the images, for intervals."""
    seed: int

    def score_accuracy(
        self,
        metric: str,
        correct: np.ndarray,
        leaked: np.ndarray | None = None,
        note: str = "",
        chance: float | None = None,
    ) -> Score:
        """Score a bool array of answers.

        Resampling n answers with replacement and averaging them is a binomial draw, so that is what is drawn.

        Args:
            leaked: bool, for each answer whether its image was seen in training.
            chance: what guessing gets, 0 to 1.
        """
        n, share = len(correct), float(correct.mean())
        drawn = self._generator().binomial(n, share, self.resamples) / n
        score = replace(self.score_value(metric, share, n, note=note, is_fraction=True), chance=chance)
        return _add_interval(score, drawn, leaked, lambda rows: float(correct[rows].mean()))

    def score_images(
        self,
        metric: str,
        images: int,
        value: Callable[[np.ndarray], float],
        leaked: np.ndarray | None = None,
        note: str = "",
        is_fraction: bool = True,
        better: Better = "higher",
    ) -> Score:
        """Score what a function says of all images, and of as many drawn with replacement.

        Args:
            value: rows of images, int64, some of them several times, to the score.
        """
        chance = self._generator()
        drawn = np.array([value(chance.integers(0, images, images)) for _ in range(self.resamples)])
        score = self.score_value(
            metric, value(np.arange(images)), images, note=note, is_fraction=is_fraction, better=better
        )
        # A resample lacks some images, and so some classes of an mIoU, say: what that shifts all draws by is no error.
        return _add_interval(score, drawn - (np.nanmean(drawn) - score.value), leaked, value)

    def score_draws(self, metric: str, draws: Sequence[np.ndarray], leaked: np.ndarray | None = None) -> Score:
        """Score the mean accuracy over repeated draws of the training images, with Student's t interval.

        Args:
            draws: bool arrays of answers for the same test images.
        """
        mean, low, high = t_interval(np.array([right.mean() for right in draws]))
        note = f"{len(draws)} draws"
        score = Score(self.protocol, metric, self.model, mean, low, high, len(draws[0]), note=note)
        if leaked is None:
            return score
        clean = float(np.mean([right[~leaked].mean() for right in draws])) if not leaked.all() else None
        return replace(score, leaked=int(leaked.sum()), without_leaks=clean)

    def score_value(
        self,
        metric: str,
        value: float,
        images: int,
        note: str = "",
        is_fraction: bool = False,
        better: Better = "higher",
    ) -> Score:
        """A number without an interval."""
        return Score(self.protocol, metric, self.model, value, None, None, images, is_fraction, better, note=note)

    def _generator(self) -> np.random.Generator:
        return make_rng(self.seed, "bootstrap")


def t_interval(values: np.ndarray) -> tuple[float, float | None, float | None]:
    """Mean of some values and its 95 % interval by Student's t; of a single value that is not known."""
    from scipy.stats import t

    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def paired_interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean difference of answers to the same questions, bool `[n]`: both are resampled together.

    Resampling n differences of -1, 0 and 1 is a multinomial draw, so that is what is drawn.
    """
    counts = np.array([(ours & ~theirs).sum(), (~ours & theirs).sum(), (ours == theirs).sum()])
    drawn = make_rng(0, "pairs").multinomial(len(ours), counts / len(ours), _RESAMPLES)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / len(ours), _PERCENTILES)
    return float(low), float(high)


def _add_interval(
    score: Score, drawn: np.ndarray, leaked: np.ndarray | None, value: Callable[[np.ndarray], float]
) -> Score:
    """A score with its interval, and the value on the images that did not leak."""
    low, high = (float(each) for each in np.nanpercentile(drawn, _PERCENTILES))
    found: dict[str, Any] = asdict(score) | {"low": low, "high": high}
    if leaked is not None:
        kept = np.flatnonzero(~leaked)
        found |= {"leaked": int(leaked.sum()), "without_leaks": value(kept) if len(kept) else None}
    return Score(**found)


def select_headlines(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first row of each protocol and model."""
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        found.setdefault((row["protocol"], row["model"]), row)
    return list(found.values())
