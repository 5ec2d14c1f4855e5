"""Charts of the run page, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, ACCENT, MUTED = "#1c2430", "#2f6f8f", "#c9d3da"
_SERIES = ("#2f6f8f", "#c2703d", "#5b8c5a", "#8a5a8c", "#7a7a7a", "#b0903a")


def losses(curves: Mapping[str, Sequence[float]]) -> bytes:
    """One small panel for each loss term over the steps."""
    figure = _figure(2.9 * len(curves), 2.2)
    for number, (name, values) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), number + 1)
        axes.plot(values, color=MUTED, linewidth=0.7)
        axes.plot(_smooth(values), color=_SERIES[number % len(_SERIES)], linewidth=1.6)
        axes.set_title(name, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("step", fontsize=8, color=INK)
        _plain(axes)
    return _png(figure)


def accuracies(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Bars with intervals: one group a protocol, one bar a subject."""
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    figure = _figure(1.6 + 0.62 * len(protocols) * (len(subjects) + 1), 2.6)
    axes = figure.add_subplot(1, 1, 1)
    for row in rows:
        place = protocols.index(row["protocol"]) * (len(subjects) + 1) + subjects.index(row["subject"])
        colour = _SERIES[subjects.index(row["subject"]) % len(_SERIES)]
        interval = [[100 * (row["value"] - row["low"])], [100 * (row["high"] - row["value"])]]
        axes.bar(place, 100 * row["value"], color=colour, width=0.86)
        axes.errorbar(place, 100 * row["value"], yerr=interval, color=INK, capsize=2, linewidth=1)
        axes.text(place, 1, f"{100 * row['value']:.1f}", ha="center", va="bottom", fontsize=7, color="white")
    axes.set_xticks([i * (len(subjects) + 1) + (len(subjects) - 1) / 2 for i in range(len(protocols))], protocols)
    axes.set_ylabel("accuracy, %", fontsize=8, color=INK)
    for number, subject in enumerate(subjects):
        axes.bar(0, 0, color=_SERIES[number % len(_SERIES)], label=subject)
    axes.legend(fontsize=7, frameon=False, ncols=len(subjects), loc="lower left", bbox_to_anchor=(0, 1))
    _plain(axes)
    return _png(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the curve."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    smoothed, state = [], values[0]
    for value in values:
        state = keep * state + (1 - keep) * value
        smoothed.append(state)
    return smoothed


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
