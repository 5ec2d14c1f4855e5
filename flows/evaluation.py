"""Evaluation as a command and as a flow: datasets of any origin made corpora, the report, the gate, comparisons."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from curation.config import IngestConfig
from eval.config import CompareConfig, EvaluateConfig
from eval.datasets import corpus_of, is_named
from eval.gate import require
from eval.rendering import PAGE
from eval.summary import headline_rows
from flows.outcome import shown
from infra import storage
from infra.artifacts import Artifact, find, open_artifact
from infra.errors import UserError


def evaluate(config: EvaluateConfig) -> Artifact:
    """Score a backbone on datasets of any origin; return the report.

    Raises:
        Regression: scores fell further than the configuration's gate allows.
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
    out = storage.join(storage.parent(config.out), "datasets", "{id}")
    if is_named(url):
        corpus = corpus_of(url, out)
        if unpaired := corpus.metrics["rejected"].get("unpaired"):
            print(f"{url}: {unpaired} images without a map are left out", file=sys.stderr)
        return corpus.url
    if find(url) is not None:
        return url
    from curation.ingest import ingest

    return ingest(IngestConfig(source=url, out=out)).url


def show(report: Artifact) -> None:
    """Print a report's headlines, and where it is."""
    told = report.read_json("report.json")
    rows = headline_rows(told["rows"])
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    table = Table("protocol", "metric", *subjects, "95 % interval", "without leaks", box=None)
    for row in (row for row in rows if row["subject"] == subjects[0]):
        others = {each["subject"]: each for each in rows if each["protocol"] == row["protocol"]}
        values = [shown(others[name]["value"], row["share"]) if name in others else "" for name in subjects]
        interval = "" if row["low"] is None else " – ".join(shown(row[end], row["share"]) for end in ("low", "high"))
        clean = shown(row["without_leaks"], row["share"])
        table.add_row(escape(row["protocol"]), escape(row["metric"]), *values, interval, clean)
    console = Console(soft_wrap=True, highlight=False, stderr=True)
    console.print(table)
    for name, reason in told["left_out"].items():
        console.print(escape(f"{name}: not scored, {reason}"))
    console.print(f"page: {storage.join(report.url, PAGE)}")


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
    from eval.summary import label

    report = open_artifact(url, "report")
    return f"{number + 1}: {label(report.manifest.config.get('model', {})) or Path(url).name}"


def show_comparison(comparison: Artifact) -> None:
    """Print a comparison, and where it is."""
    rows = comparison.read_json("report.json")["rows"]
    groups = list(dict.fromkeys(row["subject"] for row in rows))
    table = Table("protocol", "metric", *(escape(name) for name in groups), box=None)
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        of = {row["subject"]: row for row in rows if row["protocol"] == protocol}
        values = [shown(of[name]["value"], of[name]["share"]) for name in groups]
        table.add_row(escape(protocol), escape(of[groups[0]]["metric"]), *values)
    console = Console(soft_wrap=True, highlight=False, stderr=True)
    console.print(table)
    console.print(f"page: {storage.join(comparison.url, PAGE)}")
