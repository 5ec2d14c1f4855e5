"""Charts of the run page, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

INK, ACCENT, MUTED = "#1c2430", "#2f6f8f", "#c9d3da"
_SERIES = ("#2f6f8f", "#c2703d", "#5b8c5a", "#8a5a8c", "#7a7a7a", "#b0903a")


def plot_losses(curves: Mapping[str, Sequence[float]]) -> bytes:
    """One small panel for each loss term over the steps, a few in a row."""
    columns = min(len(curves), 4)
    rows = -(-len(curves) // columns)
    figure = _figure(2.9 * columns, 2.2 * rows)
    for number, (name, values) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.plot(values, color=MUTED, linewidth=0.7)
        axes.plot(_smooth(values), color=_SERIES[number % len(_SERIES)], linewidth=1.6)
        axes.set_title(name, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("step", fontsize=8, color=INK)
        _plain(axes)
    return _png(figure)


def plot_scores(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Bars with intervals: one group a protocol, one bar a name."""
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = _figure(min(1.6 + 0.62 * len(protocols) * (len(models) + 1), 12), 2.6)
    axes = figure.add_subplot(1, 1, 1)
    for row in rows:
        place = protocols.index(row["protocol"]) * (len(models) + 1) + models.index(row["model"])
        color = _SERIES[models.index(row["model"]) % len(_SERIES)]
        axes.bar(place, 100 * row["value"], color=color, width=0.86)
        if row["low"] is not None:
            interval = [[100 * (row["value"] - row["low"])], [100 * (row["high"] - row["value"])]]
            axes.errorbar(place, 100 * row["value"], yerr=interval, color=INK, capsize=2, linewidth=1)
        axes.text(place, 1, f"{100 * row['value']:.1f}", ha="center", va="bottom", fontsize=7, color="white")
    axes.set_xticks([i * (len(models) + 1) + (len(models) - 1) / 2 for i in range(len(protocols))], protocols)
    axes.set_ylabel("%", fontsize=8, color=INK)
    for number, name in enumerate(models):
        axes.bar(0, 0, color=_SERIES[number % len(_SERIES)], label=name.replace("$", r"\$"))  # no formula
    axes.legend(fontsize=7, frameon=False, ncols=len(models), loc="lower left", bbox_to_anchor=(0, 1))
    _plain(axes)
    return _png(figure)


def plot_curve(points: Sequence[Sequence[float]], label: str, at: float | None) -> bytes:
    """How many images a step drops at each setting; the chosen one is marked."""
    figure = _figure(4.4, 2.4)
    axes = figure.add_subplot(1, 1, 1)
    axes.plot([x for x, _ in points], [y for _, y in points], color=_SERIES[0], linewidth=1.6)
    _mark(axes, at)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label, fontsize=8, color=INK)
    axes.set_ylabel("images", fontsize=8, color=INK)
    _plain(axes)
    return _png(figure)


def plot_histogram(bins: Sequence[Sequence[float]], label: str, at: float | None) -> bytes:
    """Counts by their bins' lower borders, on a logarithmic scale."""
    figure = _figure(4.4, 2.4)
    axes = figure.add_subplot(1, 1, 1)
    width = bins[1][0] - bins[0][0] if len(bins) > 1 else 0.01
    axes.bar([x for x, _ in bins], [y for _, y in bins], width=width, align="edge", color=_SERIES[0])
    axes.set_yscale("symlog", linthresh=1)
    _mark(axes, at)
    axes.set_xlabel(label, fontsize=8, color=INK)
    axes.set_ylabel("images", fontsize=8, color=INK)
    _plain(axes)
    return _png(figure)


def plot_evenness(levels: Sequence[Mapping[str, Any]]) -> bytes:
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


def scatter_with_trend(
    values: Sequence[float], scores: Sequence[float], label: str, what: str, log: bool = False
) -> bytes:
    """Scores of the values of a setting, the best marked."""
    figure = _figure(4.4, 2.4)
    axes = figure.add_subplot(1, 1, 1)
    axes.plot(values, [100 * each for each in scores], color=_SERIES[0], linewidth=1.6, marker="o", markersize=3)
    if log:
        axes.set_xscale("log")
    _mark(axes, values[max(range(len(scores)), key=scores.__getitem__)])
    axes.set_xlabel(label, fontsize=8, color=INK)
    axes.set_ylabel(f"{what}, %", fontsize=8, color=INK)
    _plain(axes)
    return _png(figure)


def plot_grid(settings: Sequence[tuple[str, float]], scores: Sequence[float]) -> bytes:
    """One line a kind of probe, over its learning rates."""
    figure = _figure(5.2, 2.8)
    axes = figure.add_subplot(1, 1, 1)
    for number, name in enumerate(dict.fromkeys(name for name, _ in settings)):
        points = sorted((rate, score) for (kind, rate), score in zip(settings, scores, strict=True) if kind == name)
        rates, values = [rate for rate, _ in points], [100 * score for _, score in points]
        axes.plot(rates, values, color=_SERIES[number % len(_SERIES)], label=name, marker="o", markersize=3)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", fontsize=8, color=INK)
    axes.set_ylabel("accuracy, %", fontsize=8, color=INK)
    axes.legend(fontsize=7, frameon=False)
    _plain(axes)
    return _png(figure)


def corruption_curves(severities: Sequence[int], errors: Mapping[str, Sequence[float]]) -> bytes:
    """One small panel a corruption: its error over severities."""
    columns = 5
    rows = -(-len(errors) // columns)
    figure = _figure(1.7 * columns, 1.4 * rows)
    for number, (name, values) in enumerate(errors.items()):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.plot(severities, [100 * each for each in values], color=_SERIES[0], marker="o", markersize=3)
        axes.set_ylim(0, 100)
        axes.set_title(name.replace("_", " "), fontsize=8, color=INK, loc="left")
        _plain(axes)
    return _png(figure)


def plot_confusion(labels: NDArray[Any], found: NDArray[Any], names: Sequence[str]) -> bytes:
    """Share of each true class (rows) taken for each class (columns); the darker the more."""
    import numpy as np

    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (labels, found), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(2.0 + 0.28 * len(names), 9)
    figure = _figure(side, side)
    axes = figure.add_subplot(1, 1, 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(names))
    shown = [name.replace("$", r"\$")[:18] for name in names]
    axes.set_xticks(ticks, shown, rotation=90, fontsize=7)
    axes.set_yticks(ticks, shown, fontsize=7)
    axes.set_xlabel("answer", fontsize=8, color=INK)
    axes.set_ylabel("truth", fontsize=8, color=INK)
    if len(names) <= 12:
        for row, column in np.ndindex(*shares.shape):
            if counts[row, column]:
                ink = "white" if shares[row, column] > 0.5 else INK
                axes.text(
                    column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", fontsize=7, color=ink
                )
    return _png(figure)


def scatter_classes(places: NDArray[Any], labels: NDArray[Any] | None, names: Sequence[str]) -> bytes:
    """Points `[n, 2]` colored by class."""
    from matplotlib import colormaps

    figure = _figure(6.4, 4.8)
    axes = figure.add_subplot(1, 1, 1)
    if labels is None:
        axes.scatter(places[:, 0], places[:, 1], s=5, color=ACCENT, linewidths=0)
    else:
        colors = colormaps["tab20"]
        for number in sorted(set(labels.tolist())):
            name = names[number].replace("$", r"\$")[:18] if len(names) <= 20 else None
            some = places[labels == number]
            axes.scatter(some[:, 0], some[:, 1], s=6, color=colors(number % 20), linewidths=0, label=name)
        if len(names) <= 20:
            axes.legend(fontsize=7, frameon=False, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_axis_off()
    return _png(figure)


def _mark(axes: Any, at: float | None) -> None:
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
