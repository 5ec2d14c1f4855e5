"""Headline scores as bars that a page draws in HTML, so that they fit every screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eval.stats.scores import select_headlines
from eval.stats.verdict import MODEL

UNTRAINED = "untrained"


@dataclass(frozen=True)
class Bar:
    """One backbone's score by one protocol, in percent."""

    name: str
    value: float
    low: float | None
    high: float | None
    untrained: float | None = None
    """That of the same network before its first step."""
    is_baseline: bool = False


@dataclass(frozen=True)
class Bars:
    """The scores of all backbones by one protocol."""

    protocol: str
    metric: str
    chance: float | None
    """What guessing gets, in percent."""
    bars: list[Bar] = field(default_factory=list)


def backbone_name(stage: str) -> str:
    """The backbone that a stage evaluated, by the stage's name."""
    return stage.removeprefix("evaluate-")


def make_bars(reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Bars]:
    """Bars of the protocols whose headline is a share.

    Args:
        reports: by the backbone's name the rows of its report. Baselines that all share stand once, at the end; of
            several backbones, each bar has a mark where its untrained network is.
    """
    found: dict[str, Bars] = {}
    baselines: dict[str, dict[str, Bar]] = {}
    for name, rows in reports.items():
        by_protocol: dict[str, dict[str, Mapping[str, Any]]] = {}
        for row in select_headlines(rows):
            if row["is_fraction"]:
                by_protocol.setdefault(row["protocol"], {})[row["model"]] = row
        for protocol, rows_by_model in by_protocol.items():
            model = rows_by_model.get(MODEL, next(iter(rows_by_model.values())))
            group = found.setdefault(protocol, Bars(protocol, model["metric"], _percent(model.get("chance"))))
            untrained = rows_by_model.get(UNTRAINED) if len(reports) > 1 else None
            group.bars.append(_bar(name, model, untrained))
            for baseline, row in rows_by_model.items():
                if baseline != MODEL and not (baseline == UNTRAINED and len(reports) > 1):
                    bar = _bar(baseline, row, None, is_baseline=True)
                    baselines.setdefault(protocol, {}).setdefault(baseline, bar)
    for protocol, group in found.items():
        group.bars.extend(baselines.get(protocol, {}).values())
    return list(found.values())


def _bar(name: str, row: Mapping[str, Any], untrained: Mapping[str, Any] | None, is_baseline: bool = False) -> Bar:
    low, high = (_percent(row[end]) for end in ("low", "high"))
    before = None if untrained is None else _percent(untrained["value"])
    return Bar(name, 100 * row["value"], low, high, before, is_baseline)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
