"""The part of the page that tells of a curation's steps: what each took, found and may have missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eval.report import charts
from eval.report.gallery import data_uri
from infra.artifacts.artifact import Artifact


@dataclass(frozen=True)
class StepReport:
    """One step, in a table's row."""

    name: str
    kept: int
    dropped: int
    seconds: float
    cpu_seconds: float
    peak_gb: float
    recall: str
    details: dict[str, str]


@dataclass(frozen=True)
class CurationReport:
    """The steps of one selection, and their charts as data URIs with headings."""

    name: str
    rows: list[StepReport]
    charts: list[tuple[str, str]]


def report_curation(name: str, artifact: Artifact) -> CurationReport:
    """What a selection's manifest tells of its steps."""
    rows, drawn = [], []
    for number, step in enumerate(artifact.metrics["steps"]):
        settings = artifact.manifest.config["steps"][number]
        rows.append(_report_step(step))
        drawn += _charts(step, settings)
    return CurationReport(name, rows, [(title, data_uri(picture, "image/png")) for title, picture in drawn])


def _report_step(step: dict[str, Any]) -> StepReport:
    details = {
        key.replace("_", " "): f"{value:,}" for key, value in step.items() if key in _DETAILS and isinstance(value, int)
    }
    for level in (each for each in step.get("levels", []) if "kept_of_rare" in each):
        kept = f"{100 * level['kept_of_rare']:.0f} % of {level['images_of_rare']:,} images kept"
        details[f"rarest of {level['clusters']:,} clusters"] = f"{kept}, {100 * level['kept_of_all']:.0f} % of all"
    for name, facts in step.get("sets", {}).items():
        details[facts.get("name", name)] = (
            f"{facts['leaks']:,} leaks, {facts.get('collateral', 0):,} more in their components"
        )
    common = (step["seconds"], step["cpu_seconds"], step["peak_gb"])
    return StepReport(
        step["step"].replace("_", " "), step["kept"], step.get("dropped", 0), *common, _recall(step), details
    )


_DETAILS = (
    *("components", "largest", "groups_split_off", "neighbors", "collisions", "missing", "clusters", "drawn"),
    *("clusters_with_seeds", "clusters_below_quota", "entries", "entries_found", "entries_above", "no_metadata_match"),
)


def _axis(step: dict[str, Any], settings: dict[str, Any]) -> tuple[str, float | None]:
    """What a step's curve runs over, and the value that was taken."""
    if "threshold" in settings:
        return "cosine similarity", settings["threshold"]
    return ("eps", settings["eps"]) if "eps" in settings else ("score", step.get("least"))


def _recall(step: dict[str, Any]) -> str:
    """Measured on a sample, with its interval."""
    found = step.get("recall")
    if found is None and isinstance(step.get("components"), dict):
        found = step["components"].get("recall")
    return "" if found is None else f"{found['value']:.4f} ({found['low']:.4f} – {found['high']:.4f})"


def _charts(step: dict[str, Any], settings: dict[str, Any]) -> list[tuple[str, bytes]]:
    name, drawn = step["step"].replace("_", " "), []
    if step.get("curve"):
        label, at = _axis(step, settings)
        drawn.append((f"{name}: images dropped at each {label}", charts.plot_curve(step["curve"], label, at)))
    for reference, facts in step.get("sets", {}).items():
        title = f"{name}: images by their similarity to {facts.get('name', reference)}"
        drawn.append((title, charts.plot_histogram(facts["histogram"], "cosine similarity", settings["threshold"])))
    if "levels" in step:
        drawn.append((f"{name}: evenness over clusters", charts.plot_evenness(step["levels"])))
    return drawn
