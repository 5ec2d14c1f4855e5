"""Evaluation as a command and as a flow: datasets of any origin made corpora, the report, the gate, comparisons."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from curation.config import IngestConfig
from eval.config import CompareConfig, EvaluateConfig
from eval.data.datasets import ingest_named, is_named
from eval.gate import require
from eval.report.templating import PAGE
from eval.stats.scores import select_headlines
from flows.outcome import format_score
from infra.artifacts.artifact import Artifact, find, open_artifact
from infra.errors import UserError
from infra.storage import filesystem


def evaluate(config: EvaluateConfig) -> Artifact:
    """Score a backbone on datasets of any origin; return the report.

    Raises:
        RegressionError: scores fell further than the configuration's gate allows.
        UserError: something is missing.
    """
    from eval import run

    needed = config.needed()
    datasets = {name: _corpus(url, config) if name in needed else url for name, url in config.datasets.items()}
    report = run(config.model_copy(update={"datasets": datasets}))
    if config.gate is not None:
        require(report, config.gate)
    return report


def _corpus(url: str, config: EvaluateConfig) -> str:
    """URL of a dataset's corpus, made beside the report where there is none yet."""
    out = filesystem.join(filesystem.parent(config.out), "datasets", "{id}")
    if is_named(url):
        corpus = ingest_named(url, out)
        if unpaired := corpus.metrics["rejected"].get("unpaired"):
            print(f"{url}: {unpaired} images without a map are left out", file=sys.stderr)
        return corpus.url
    if find(url) is not None:
        return url
    from curation.ingest.ingest import ingest

    return ingest(IngestConfig(source=url, out=out)).url


def show(report: Artifact) -> None:
    """Print a report's headlines, its verdict, and where it is."""
    told = report.read_json("report.json")
    console = Console(soft_wrap=True, highlight=False, stderr=True)
    rows = select_headlines(told["rows"])
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        console.print(_scores([row for row in rows if row["protocol"] == protocol]))
    for name, reason in told["left_out"].items():
        console.print(escape(f"{name}: not scored, {reason}"))
    if told["verdict"]:
        console.print(escape(told["verdict"]))
    console.print(escape(f"page: {filesystem.join(report.url, PAGE)}"))


def _scores(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One protocol: a line a backbone or baseline, with its interval."""
    title = escape(f"{rows[0]['protocol']}: {rows[0]['metric']}")
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    for row in rows:
        interval = ""
        if row["low"] is not None:
            interval = (
                f"{format_score(row['low'], row['is_fraction'])} to {format_score(row['high'], row['is_fraction'])}"
            )
        clean = format_score(row["without_leaks"], row["is_fraction"])
        value = format_score(row["value"], row["is_fraction"])
        table.add_row(escape(row["model"]), value, interval, f"without leaks {clean}" if clean else "")
    return table


def compare(reports: Sequence[str], title: str, out: str) -> Artifact:
    """Write reports side by side.

    Args:
        reports: URLs, or NAME=URL.
    """
    from eval.compare import compare as write

    if len(reports) < 2:
        raise UserError("compare: needs two reports or more; give their URLs, or NAME=URL")
    groups: dict[str, list[str]] = {}
    for number, each in enumerate(reports):
        name, equals, url = each.partition("=")
        if not equals:
            name, url = "", each
        url = url.removesuffix(f"/{PAGE}")
        groups.setdefault(name or _name(url, number), []).append(url)
    return write(CompareConfig(title=title, groups=groups, out=out))


def _name(url: str, number: int) -> str:
    """What a report's backbone is called, with its place, for two may be called alike."""
    from eval.report.evaluation_page import label

    report = open_artifact(url, "report")
    return f"{number + 1}: {label(report.manifest.config.get('model', {})) or Path(url).name}"


def show_comparison(comparison: Artifact) -> None:
    """Print a comparison, and where it is."""
    told = comparison.read_json("report.json")
    console = Console(soft_wrap=True, highlight=False, stderr=True)
    for protocol in dict.fromkeys(row["protocol"] for row in told["rows"]):
        rows = [row for row in told["rows"] if row["protocol"] == protocol]
        title = escape(f"{protocol}: {rows[0]['metric']}")
        table = Table(title=title, title_justify="left", box=None, show_header=False)
        for row in rows:
            gain = "" if row["model"] == rows[0]["model"] else f"gain {describe_gain(row)}"
            table.add_row(escape(row["model"]), format_score(row["value"], row["is_fraction"]), gain)
        console.print(table)
    for name, reason in told["left_out"].items():
        console.print(escape(f"{name}: not compared, {reason}"))
    console.print(escape(f"page: {filesystem.join(comparison.url, PAGE)}"))


def describe_gain(row: Mapping[str, Any]) -> str:
    """The difference to the first group with its interval, in points of a percentage or in the metric's own unit."""
    factor, digits = (100, "+.2f") if row["is_fraction"] else (1, "+.4g")
    text = format(factor * row["gain"], digits)
    if row["gain_low"] is None:
        return text
    return f"{text} ({format(factor * row['gain_low'], digits)} to {format(factor * row['gain_high'], digits)})"
