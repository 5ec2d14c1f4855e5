"""Groups of evaluations side by side: means over seeds, and how far each group is from the first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval import charts
from eval.config import CompareConfig
from eval.gallery import data_uri
from eval.rendering import PAGE, rendered
from infra.artifacts import Artifact, Plan, find, open_artifact, produce
from infra.errors import UserError

VERSION = 1
_SUBJECT = "model"  # of a report: not its baselines


@dataclass(frozen=True)
class Mean:
    """The mean of one protocol over the reports of a group, with its 95 % interval by Student's t, all 0 to 1."""

    protocol: str
    subject: str
    value: float
    low: float | None
    """None, as all bounds, where a single report tells nothing of them"""
    high: float | None
    reports: int
    images: int
    """That the first report's backbone was trained on; 0 where it was not trained here"""
    gain: float
    """Mean of the differences to the first group's reports, one by one"""
    gain_low: float | None
    gain_high: float | None


def compare(config: CompareConfig) -> Artifact:
    """Write reports side by side; return the report artifact.

    Raises:
        UserError: a report is missing, or was made by other protocols.
    """
    groups = {name: [open_artifact(url, "report") for url in urls] for name, urls in config.groups.items()}
    inputs = {f"{name}_{i}": each.as_input() for name, group in groups.items() for i, each in enumerate(group)}
    plan = Plan("report", "compare", VERSION, {"title": config.title, "groups": list(groups)}, inputs)
    return produce(plan, config.out, lambda directory: _write(config.title, groups, directory))


def _write(title: str, groups: Mapping[str, Sequence[Artifact]], directory: Path) -> Mapping[str, Any]:
    first = next(iter(groups.values()))
    protocols = first[0].metrics
    for each in (report for group in groups.values() for report in group):
        if missing := [name for name in protocols if _SUBJECT not in each.metrics.get(name, {})]:
            raise UserError(f"{each.url}: has no score of a model by {missing[0]}; evaluate all alike")
    rows = [
        _mean(protocol, name, group, first) for protocol in protocols for name, group in groups.items()
    ]  # fmt: skip
    told = [asdict(row) for row in rows]
    picture = charts.accuracies(told)
    (directory / "report.json").write_text(json.dumps({"rows": told}, indent=1))
    (directory / "comparison.png").write_bytes(picture)
    page = rendered("compare", title=title, rows=rows, first=next(iter(groups)), chart=data_uri(picture, "image/png"))
    (directory / PAGE).write_text(page, encoding="utf-8")
    return {row.protocol: {each.subject: each.value for each in rows if each.protocol == row.protocol} for row in rows}


def _mean(protocol: str, name: str, group: Sequence[Artifact], first: Sequence[Artifact]) -> Mean:
    values, theirs = (np.array([each.metrics[protocol][_SUBJECT] for each in some]) for some in (group, first))
    paired = min(len(values), len(theirs))
    gain = _interval(values[:paired] - theirs[:paired])
    return Mean(protocol, name, *_interval(values), len(values), _images(group[0]), *gain)


def _interval(values: np.ndarray) -> tuple[float, float | None, float | None]:
    """Mean of some values and its 95 % interval; of a single value that is not known."""
    from scipy.stats import t

    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def _images(report: Artifact) -> int:
    backbone = report.manifest.inputs.get("backbone")
    trained = find(backbone.url) if backbone is not None else None
    return int(trained.metrics.get("images", 0)) if trained is not None else 0
