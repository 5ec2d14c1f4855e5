"""What a finished run tells on the terminal: the numbers, and where to look."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval.report.templating import PAGE
from flows.config import PipelineConfig
from flows.summary import SUMMARY
from infra.storage import filesystem


def show(config: PipelineConfig, summary: dict[str, Any]) -> None:
    """Print scores and locations to standard output."""
    console = Console(soft_wrap=True, highlight=False)
    if curation := _curation(summary):
        console.print(curation)
    for protocol, scores in summary["evaluation"].items():
        console.print(_scores(protocol, scores))
    for name, verdict in summary["verdicts"].items():
        if verdict:
            console.print(f"[bold]{escape(name)}[/bold]: {escape(verdict)}")
    for student, differences in summary["publish"].items():
        listed = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        console.print(f"features of {escape(student)} as published differ by at most: {listed}")
    artifacts = summary["artifacts"]
    places = {
        "report": filesystem.join(artifacts["report"]["url"], PAGE),
        **{
            student: filesystem.join(artifacts[f"publish-{student}"]["url"], "README.md")
            for student in summary["publish"]
        },
        "summary": filesystem.join(config.root, SUMMARY),
    }
    console.print()
    for name, place in places.items():
        console.print(f"[bold]{escape(name):<11}[/bold]{escape(place)}")


def _curation(summary: dict[str, Any]) -> Table | None:
    table = Table("curation", "precision", "recall", title_justify="left", box=None)
    for step in ("dedup", "decontamination", "retrieval"):
        if step in summary:
            scores = summary[step]
            table.add_row(step, *(f"{scores[each]:.3f}" if each in scores else "" for each in ("precision", "recall")))
    return table if table.row_count else None


def _scores(protocol: str, scores: dict[str, Any]) -> Table:
    """One protocol: a line a backbone, beside its own untrained network, and raw pixels."""
    table = Table(
        title=f"{escape(protocol)}: {escape(scores['metric'])}", title_justify="left", box=None, show_header=False
    )
    for name, value in scores["values"].items():
        before = format_score(scores["untrained"].get(name), scores["is_fraction"])
        table.add_row(escape(name), format_score(value, scores["is_fraction"]), f"untrained {before}" if before else "")
    if scores["pixels"] is not None:
        table.add_row("pixels", format_score(scores["pixels"], scores["is_fraction"]), "")
    return table


def format_score(value: float | None, share: bool) -> str:
    """A score as people read it: shares in percent."""
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if share else f"{value:.4g}"
