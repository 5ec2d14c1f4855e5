"""A report as others read it: one evaluation as a page, and its pictures and rows for the page of a whole run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.config import EvaluateConfig, file_name
from eval.report.bars import Bars, make_bars
from eval.report.gallery import data_uri
from eval.report.templating import PAGE, render_template
from infra.artifacts.artifact import Artifact

_NOTES = {
    "pca": "Images above the first three principal components of their patch tokens, all taken together, as colors: "
    "patches of one color are alike to the backbone.",
    "attention": "Where the class token looks in the last block, one column a head.",
    "map": "Images near where their vectors are, colored by class.",
    "neighbors": "Test images in blue frames before their nearest training images: green has the same class.",
    "confusion": "Share of each true class taken for each class.",
    "curve": "What chose the setting that is reported.",
    "corruptions": "Error, in percent, over severities.",
    "masks": "Images above their true masks and the found ones.",
}


@dataclass(frozen=True)
class Picture:
    """A picture with a heading and a note."""

    title: str
    note: str
    source: str


@dataclass(frozen=True)
class Section:
    """What a page tells of one evaluation."""

    name: str
    rows: list[dict[str, Any]]
    bars: list[Bars]
    """The headlines that are shares."""
    pictures: list[Picture]
    left_out: dict[str, str]
    """Reasons why tasks were not scored, by name"""
    gains: list[dict[str, Any]]
    """By protocol, over the better baseline"""
    verdict: str
    """Whether the backbone is better than its baselines; empty where there are none"""
    leak_checks: dict[str, str]
    """What was looked for in each dataset"""


def build_section(name: str, report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Section:
    """A section from what `report.json` tells and pictures by name."""
    rows = report["rows"]
    shown = [
        Picture(each.replace("-", " "), _note(each), data_uri(data, "image/png")) for each, data in pictures.items()
    ]
    checks = report.get("leak_checks", {})
    return Section(
        name,
        rows,
        make_bars({name: rows}),
        shown,
        report.get("left_out", {}),
        report.get("gains", []),
        report.get("verdict", ""),
        checks,
    )


def build_section_of_artifact(name: str, artifact: Artifact) -> Section:
    """The same of a report that was written."""
    files = sorted(file.path for file in artifact.manifest.files if file.path.endswith(".png"))
    pictures = {path.removesuffix(".png"): artifact.read_bytes(path) for path in files}
    return build_section(name, artifact.read_json("report.json"), pictures)


def write(config: EvaluateConfig, told: Mapping[str, Any], directory: Path) -> None:
    """The page of one evaluation."""
    pictures = {path.stem: path.read_bytes() for path in sorted(directory.glob("*.png"))}
    found = build_section(label(config.model.model_dump(mode="json")), told, pictures)
    (directory / PAGE).write_text(render_template("evaluation", each=found), encoding="utf-8")


def label(model: Mapping[str, Any]) -> str:
    """What a backbone is called, by its settings."""
    if model.get("kind") == "checkpoint" and "url" in model:
        return f"checkpoint {Path(model['url']).name}"
    return " ".join(str(model[key]) for key in ("kind", "model") if key in model)


def _note(name: str) -> str:
    return _NOTES.get(name.rpartition("-")[2], "")


def datasets_of_protocol(report: Artifact, protocol: str) -> tuple[Any, list[str]] | None:
    """The task of a protocol and the ids of the datasets that it read; None where the report does not say."""
    tasks = {task["name"] or task["kind"]: task for task in report.manifest.config.get("tasks", [])}
    task = tasks.get(protocol)
    if task is None:
        return None
    names = [task[role] for role in ("train", "test", "queries") if role in task]
    return task, [report.manifest.inputs[f"dataset_{name}"].id for name in names]


def answers_file(protocol: str) -> str:
    """Where a report keeps which test images a protocol's headline had right."""
    return f"{file_name(protocol)}-answers.npy"
