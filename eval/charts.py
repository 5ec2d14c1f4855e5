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
        axes.bar(place, 100 * row["value"], color=colour, width=0.86)
        if row["low"] is not None:
            interval = [[100 * (row["value"] - row["low"])], [100 * (row["high"] - row["value"])]]
            axes.errorbar(place, 100 * row["value"], yerr=interval, color=INK, capsize=2, linewidth=1)
        axes.text(place, 1, f"{100 * row['value']:.1f}", ha="center", va="bottom", fontsize=7, color="white")
    axes.set_xticks([i * (len(subjects) + 1) + (len(subjects) - 1) / 2 for i in range(len(protocols))], protocols)
    axes.set_ylabel("accuracy, %", fontsize=8, color=INK)
    for number, subject in enumerate(subjects):
        axes.bar(0, 0, color=_SERIES[number % len(_SERIES)], label=subject.replace("$", r"\$"))  # no formula
    axes.legend(fontsize=7, frameon=False, ncols=len(subjects), loc="lower left", bbox_to_anchor=(0, 1))
    _plain(axes)
    return _png(figure)


def curve(points: Sequence[Sequence[float]], label: str, at: float | None) -> bytes:
    """How many images a step drops at each setting; the chosen one is marked."""
    figure = _figure(4.4, 2.4)
    axes = figure.add_subplot(1, 1, 1)
    axes.plot([x for x, _ in points], [y for _, y in points], color=_SERIES[0], linewidth=1.6)
    _marked(axes, at)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label, fontsize=8, color=INK)
    axes.set_ylabel("images", fontsize=8, color=INK)
    _plain(axes)
    return _png(figure)


def histogram(bins: Sequence[Sequence[float]], label: str, at: float | None) -> bytes:
    """Counts by their bins' lower borders, on a logarithmic scale."""
    figure = _figure(4.4, 2.4)
    axes = figure.add_subplot(1, 1, 1)
    width = bins[1][0] - bins[0][0] if len(bins) > 1 else 0.01
    axes.bar([x for x, _ in bins], [y for _, y in bins], width=width, align="edge", color=_SERIES[0])
    axes.set_yscale("symlog", linthresh=1)
    _marked(axes, at)
    axes.set_xlabel(label, fontsize=8, color=INK)
    axes.set_ylabel("images", fontsize=8, color=INK)
    _plain(axes)
    return _png(figure)


def evenness(levels: Sequence[Mapping[str, Any]]) -> bytes:
    """The effective share of each level's clusters, before and after."""
    figure = _figure(4.4, 2.4)
    axes = figure.add_subplot(1, 1, 1)
    for number, when in enumerate(("before", "after")):
        places = [place + 0.42 * number for place in range(len(levels))]
        shares = [level[when]["effective"] / level["clusters"] for level in levels]
        axes.bar(places, shares, width=0.4, color=_SERIES[number], label=when)
    axes.set_xticks([place + 0.21 for place in range(len(levels))], [f"{level['clusters']:,}" for level in levels])
    axes.set_xlabel("clusters of the level", fontsize=8, color=INK)
    axes.set_ylabel("effective share", fontsize=8, color=INK)
    axes.legend(fontsize=7, frameon=False)
    _plain(axes)
    return _png(figure)


def _marked(axes: Any, at: float | None) -> None:
    if at is not None:
        axes.axvline(at, color=_SERIES[1], linewidth=1.2, linestyle="--")


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
