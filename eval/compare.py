"""Groups of evaluations side by side: means over seeds, and how far each group is from the first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval import charts
from eval.bars import bars_of
from eval.config import CompareConfig
from eval.rendering import PAGE, rendered
from eval.scores import headline_rows, paired_interval, t_interval
from eval.summary import answers_file, scored_on
from infra.artifacts import Artifact, ArtifactSpec, find, open_artifact, produce
from infra.errors import UserError

VERSION = 3
_SUBJECT = "model"  # of a report: not its baselines
Headlines = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Mean:
    """The mean of one protocol's headline over the reports of a group, with its 95 % interval: by Student's t over
    several reports, of a single one its own."""

    protocol: str
    metric: str
    subject: str
    value: float
    low: float | None
    high: float | None
    share: bool
    """Whether all are shares, shown in percent"""
    better: str
    reports: int
    images: int
    """That the first report's backbone was trained on; 0 where it was not trained here"""
    gain: float
    """Mean of the differences to the first group's reports, one by one"""
    gain_low: float | None
    """By Student's t; of single reports by resampling the test images of both together; None, as the other bound, where
    nothing is known of it"""
    gain_high: float | None


def compare(config: CompareConfig) -> Artifact:
    """Write reports side by side; return the report artifact.

    Raises:
        UserError: a report is missing, or was made by other protocols.
    """
    groups = {name: [open_artifact(url, "report") for url in urls] for name, urls in config.groups.items()}
    inputs = {f"{name}_{i}": each.as_input() for name, group in groups.items() for i, each in enumerate(group)}
    plan = ArtifactSpec("report", "compare", VERSION, {"title": config.title, "groups": list(groups)}, inputs)
    return produce(plan, config.out, lambda directory: _write(config.title, groups, directory), restart=config.restart)


def _write(title: str, groups: Mapping[str, Sequence[Artifact]], directory: Path) -> Mapping[str, Any]:
    told = {name: [headlines(each) for each in group] for name, group in groups.items()}
    left_out = _left_out(told)
    rows = [_mean(protocol, name, groups, told) for protocol in _common(groups, told) for name in groups]
    picture = charts.accuracies([asdict(row) for row in rows if row.share])
    (directory / "report.json").write_text(
        json.dumps({"rows": [asdict(row) for row in rows], "left_out": left_out}, indent=1)
    )
    (directory / "comparison.png").write_bytes(picture)
    bars = bars_of({name: [asdict(row) for row in rows if row.subject == name] for name in groups})
    page = rendered("compare", title=title, rows=rows, first=next(iter(groups)), groups=bars, left_out=left_out)
    (directory / PAGE).write_text(page, encoding="utf-8")
    return {row.protocol: {each.subject: each.value for each in rows if each.protocol == row.protocol} for row in rows}


def headlines(report: Artifact) -> Headlines:
    """The first row of each protocol of the model."""
    if not any(file.path == "report.json" for file in report.manifest.files):
        raise UserError(f"{report.url}: tells no scores; give reports of fovea eval")
    rows = headline_rows(report.read_json("report.json")["rows"])
    return {row["protocol"]: row for row in rows if row["subject"] == _SUBJECT}


def _common(groups: Mapping[str, Sequence[Artifact]], told: Mapping[str, Sequence[Headlines]]) -> list[str]:
    """Protocols that all reports have.

    Raises:
        UserError: there is none, or one was scored in other ways or on other datasets.
    """
    reports = [report for group in groups.values() for report in group]
    rows = [each for group in told.values() for each in group]
    common = [name for name in rows[0] if all(name in each for each in rows)]
    if not common:
        raise UserError(f"compare: {reports[0].url} and the others have no protocol in common; evaluate them alike")
    for report in reports:
        require_alike(reports[0], report, common)
    return common


def _left_out(told: Mapping[str, Sequence[Headlines]]) -> dict[str, str]:
    """Protocols that some report lacks, and the groups of those that do."""
    every = dict.fromkeys(name for group in told.values() for each in group for name in each)
    lacking = {name: [who for who, group in told.items() if any(name not in each for each in group)] for name in every}
    return {name: f"no score for {', '.join(groups)}" for name, groups in lacking.items() if groups}


def require_alike(first: Artifact, other: Artifact, protocols: Sequence[str]) -> None:
    """Check that two reports scored some protocols in the same way, on the same datasets.

    Raises:
        UserError: they did not.
    """
    for name in protocols:
        before, now = scored_on(first, name), scored_on(other, name)
        if before != now:
            raise UserError(f"{other.url}: {name} has other datasets or settings than in {first.url}; evaluate alike")


def _mean(
    protocol: str, name: str, groups: Mapping[str, Sequence[Artifact]], told: Mapping[str, Sequence[Headlines]]
) -> Mean:
    base = next(iter(groups))
    group, first = ([each[protocol] for each in told[which]] for which in (name, base))
    values, theirs = (np.array([each["value"] for each in some], dtype=float) for some in (group, first))
    paired = min(len(values), len(theirs))
    value, low, high = t_interval(values)
    if len(group) == 1:
        low, high = group[0]["low"], group[0]["high"]
    metric, share, better = (group[0][key] for key in ("metric", "share", "better"))
    gain = t_interval(values[:paired] - theirs[:paired])
    if paired == 1:
        gain = (gain[0], *_over_images(protocol, groups[name], groups[base]))
    return Mean(protocol, metric, name, value, low, high, share, better, len(values), _images(groups[name][0]), *gain)


def _over_images(
    protocol: str, reports: Sequence[Artifact], others: Sequence[Artifact]
) -> tuple[float | None, float | None]:
    """The 95 % interval of the difference of two reports, where both keep their answers."""
    ours, theirs = (_answers(protocol, some[0]) for some in (reports, others))
    return (None, None) if ours is None or theirs is None else paired_interval(ours, theirs)


def _answers(protocol: str, report: Artifact) -> np.ndarray | None:
    """Answers of a protocol, where the report has them."""
    name = answers_file(protocol)
    if not any(file.path == name for file in report.manifest.files):
        return None
    return np.load(report.local_file(name), allow_pickle=False)


def _images(report: Artifact) -> int:
    backbone = report.manifest.inputs.get("backbone")
    trained = find(backbone.url) if backbone is not None else None
    return int(trained.metrics.get("images", 0)) if trained is not None else 0
