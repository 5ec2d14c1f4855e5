"""The page of a whole run: one self-contained HTML file from which the run can be judged by looking."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval import charts, summary
from eval.config import ReportConfig
from eval.exhibits import Exhibits
from eval.gallery import data_uri
from eval.rendering import PAGE, rendered
from eval.steps import steps
from infra.artifacts import Artifact, Plan, find, produce
from infra.errors import UserError
from infra.lineage import Ancestor, ancestors
from infra.progress import progress
from infra.selections import Step, steps_of
from pretrain import telemetry

VERSION = 3


def report(config: ReportConfig) -> Artifact:
    """Write the page of a run; return the report artifact.

    Raises:
        UserError: one of the artifacts is missing.
    """
    artifacts = {}
    for name, url in config.artifacts.items():
        artifact = find(url)
        if artifact is None:
            raise UserError(f"{name}: no artifact at {url}; run its stage first")
        artifacts[name] = artifact
    settings = {"title": config.title, "gallery": config.gallery, "facts": config.facts}
    plan = Plan("report", "report", VERSION, settings, {name: each.as_input() for name, each in artifacts.items()})
    return produce(plan, config.out, lambda directory: _write(config, artifacts, directory), restart=config.restart)


def _write(config: ReportConfig, artifacts: Mapping[str, Artifact], directory: Path) -> Mapping[str, Any]:
    sections: dict[str, Any] = {"funnel": funnel(artifacts), "galleries": [], "curves": [], "scores": [], "steps": []}
    with progress("report", len(artifacts)) as advance:
        for name, artifact in artifacts.items():
            kind = artifact.manifest.kind
            if kind == "selection":
                sections["steps"].append(steps(name, artifact))
                sections["galleries"] += Exhibits(artifact, config.gallery).galleries()
            elif kind == "checkpoint":
                sections["curves"].append(_curves(name, artifact))
            elif artifact.manifest.stage == "evaluate":
                sections["scores"].append(summary.of_artifact(name, artifact))
            elif artifact.manifest.stage == "compare":
                picture = data_uri(artifact.read_bytes("comparison.png"), "image/png")
                sections["curves"].append(summary.Picture(name, "Headline scores of teachers while training.", picture))
            advance(note=name)
    lineage = ancestors(each.as_input() for each in artifacts.values())
    html = render(config, sections, lineage, artifacts)
    (directory / PAGE).write_text(html, encoding="utf-8")
    return {"bytes": len(html.encode()), "stages": len(artifacts)}


def funnel(artifacts: Mapping[str, Artifact]) -> list[Step]:
    """Images found, readable, and left by each curation step of the pool."""
    selections = [each for each in artifacts.values() if each.manifest.kind == "selection"]
    if not selections:
        return []
    pool = find(selections[0].manifest.inputs["corpus"].url)
    steps = []
    if pool is not None:
        rejected = sum(pool.metrics.get("rejected", {}).values())
        images = pool.metrics["images"]
        steps = [Step("found", images + rejected, 0), Step("readable", images, rejected)]
    return steps + [step for selection in selections for step in steps_of(selection)]


def _curves(name: str, artifact: Artifact) -> summary.Picture:
    steps = telemetry.parse(artifact.read_bytes(telemetry.METRICS).decode())
    rows = [telemetry.losses(row) for row in steps if telemetry.SKIPPED not in row]
    picture = charts.losses({term: [row[term] for row in rows] for term in rows[0]})
    metrics = artifact.metrics
    note = f"{metrics['steps']} steps over {metrics['images']} images, {metrics['parameters']:,} parameters."
    return summary.Picture(name, note, data_uri(picture, "image/png"))


def render(
    config: ReportConfig, sections: Mapping[str, Any], lineage: list[Ancestor], artifacts: Mapping[str, Artifact]
) -> str:
    """The HTML."""
    names = {artifact.id: name for name, artifact in artifacts.items()}
    return rendered("run", title=config.title, facts=config.facts, lineage=lineage, names=names, **sections)
