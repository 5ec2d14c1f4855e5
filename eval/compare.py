"""Groups of evaluations side by side: means over seeds, and how far each group is from the first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.config import CompareConfig
from eval.report import charts
from eval.report.bars import make_bars
from eval.report.evaluation_page import answers_file, datasets_of_protocol
from eval.report.templating import PAGE, render_template
from eval.stats.scores import paired_interval, select_headlines, t_interval
from infra.artifacts.artifact import Artifact, ArtifactSpec, find, get_or_create, open_artifact
from infra.errors import UserError

VERSION = 4
_MODEL = "model"  # of a report: not its baselines
Headlines = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class MeanScore:
    """The mean of one protocol's headline over the reports of a group, with its 95 % interval: by Student's t over
    several reports, of a single one its own."""

    protocol: str
    metric: str
    model: str
    value: float
    low: float | None
    high: float | None
    is_fraction: bool
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
    inputs = {f"{name}_{i}": each.as_ref() for name, group in groups.items() for i, each in enumerate(group)}
    plan = ArtifactSpec("report", "compare", VERSION, {"title": config.title, "groups": list(groups)}, inputs)
    return get_or_create(
        plan, config.out, lambda directory: _write(config.title, groups, directory), restart=config.restart
    )


def _write(title: str, groups: Mapping[str, Sequence[Artifact]], directory: Path) -> Mapping[str, Any]:
    told = {name: [headlines(each) for each in group] for name, group in groups.items()}
    left_out = _protocols_left_out(told)
    rows = [_mean(protocol, name, groups, told) for protocol in _common_protocols(groups, told) for name in groups]
    picture = charts.plot_scores([asdict(row) for row in rows if row.is_fraction])
    (directory / "report.json").write_text(
        json.dumps({"rows": [asdict(row) for row in rows], "left_out": left_out}, indent=1)
    )
    (directory / "comparison.png").write_bytes(picture)
    bars = make_bars({name: [asdict(row) for row in rows if row.model == name] for name in groups})
    page = render_template("compare", title=title, rows=rows, first=next(iter(groups)), groups=bars, left_out=left_out)
    (directory / PAGE).write_text(page, encoding="utf-8")
    return {row.protocol: {each.model: each.value for each in rows if each.protocol == row.protocol} for row in rows}


def headlines(report: Artifact) -> Headlines:
    """The first row of each protocol of the model."""
    if not any(file.path == "report.json" for file in report.manifest.files):
        raise UserError(f"{report.url}: has no scores; give reports of fovea eval")
    rows = select_headlines(report.read_json("report.json")["rows"])
    return {row["protocol"]: row for row in rows if row["model"] == _MODEL}


def _common_protocols(groups: Mapping[str, Sequence[Artifact]], told: Mapping[str, Sequence[Headlines]]) -> list[str]:
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
        require_same_settings(reports[0], report, common)
    return common


def _protocols_left_out(told: Mapping[str, Sequence[Headlines]]) -> dict[str, str]:
    """Protocols that some report lacks, and the groups of those that do."""
    every = dict.fromkeys(name for group in told.values() for each in group for name in each)
    lacking = {name: [who for who, group in told.items() if any(name not in each for each in group)] for name in every}
    return {name: f"no score for {', '.join(groups)}" for name, groups in lacking.items() if groups}


def require_same_settings(first: Artifact, other: Artifact, protocols: Sequence[str]) -> None:
    """Check that two reports scored some protocols in the same way, on the same datasets.

    Raises:
        UserError: they did not.
    """
    for name in protocols:
        before, now = datasets_of_protocol(first, name), datasets_of_protocol(other, name)
        if before != now:
            raise UserError(f"{other.url}: {name} has other datasets or settings than in {first.url}; evaluate alike")


def _mean(
    protocol: str, name: str, groups: Mapping[str, Sequence[Artifact]], told: Mapping[str, Sequence[Headlines]]
) -> MeanScore:
    base = next(iter(groups))
    group, first = ([each[protocol] for each in told[which]] for which in (name, base))
    values, theirs = (np.array([each["value"] for each in some], dtype=float) for some in (group, first))
    paired = min(len(values), len(theirs))
    value, low, high = t_interval(values)
    if len(group) == 1:
        low, high = group[0]["low"], group[0]["high"]
    metric, share, better = (group[0][key] for key in ("metric", "is_fraction", "better"))
    gain = t_interval(values[:paired] - theirs[:paired])
    if paired == 1:
        gain = (gain[0], *_over_images(protocol, groups[name], groups[base]))
    return MeanScore(
        protocol, metric, name, value, low, high, share, better, len(values), _images(groups[name][0]), *gain
    )


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
