"""The page of a whole run: one self-contained HTML file from which the run can be judged by looking."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.config import ReportConfig
from eval.report import charts, evaluation_page
from eval.report.bars import backbone_name, make_bars
from eval.report.curation_report import report_curation
from eval.report.gallery import data_uri
from eval.report.selection_gallery import SelectionGallery
from eval.report.templating import PAGE, render_template
from infra.artifacts.artifact import Artifact, ArtifactSpec, find, get_or_create
from infra.artifacts.lineage import Ancestor, ancestors
from infra.corpus.selection import Step, read_steps
from infra.errors import UserError
from infra.progress import progress
from pretrain.monitoring import metrics_log

VERSION = 5


def build_report(config: ReportConfig) -> Artifact:
    """Write the page of a run; return the report artifact.

    Raises:
        UserError: one of the artifacts is missing.
    """
    artifacts = _open_artifacts(config)
    spec = _spec(config, artifacts)
    return get_or_create(
        spec, config.out, lambda directory: _write(config, artifacts, directory), restart=config.restart
    )


def report_spec(config: ReportConfig) -> ArtifactSpec:
    """The report that a configuration asks for.

    Raises:
        UserError: one of the artifacts is missing.
    """
    return _spec(config, _open_artifacts(config))


def _open_artifacts(config: ReportConfig) -> dict[str, Artifact]:
    artifacts = {}
    for name, url in config.artifacts.items():
        artifact = find(url)
        if artifact is None:
            raise UserError(f"{name}: no artifact at {url}; run its stage first")
        artifacts[name] = artifact
    return artifacts


def _spec(config: ReportConfig, artifacts: Mapping[str, Artifact]) -> ArtifactSpec:
    settings = {"title": config.title, "gallery": config.gallery, "facts": config.facts}
    return ArtifactSpec(
        "report", "report", VERSION, settings, {name: each.as_ref() for name, each in artifacts.items()}
    )


def _write(config: ReportConfig, artifacts: Mapping[str, Artifact], directory: Path) -> Mapping[str, Any]:
    sections: dict[str, Any] = {"funnel": funnel(artifacts), "galleries": [], "curves": [], "scores": [], "steps": []}
    with progress("report", len(artifacts)) as advance:
        for name, artifact in artifacts.items():
            kind = artifact.manifest.kind
            if kind == "selection":
                sections["steps"].append(report_curation(name, artifact))
                sections["galleries"] += SelectionGallery(artifact, config.gallery).galleries()
            elif kind == "checkpoint":
                sections["curves"].append(_curves(name, artifact))
            elif artifact.manifest.stage == "evaluate":
                sections["scores"].append(evaluation_page.build_section_of_artifact(backbone_name(name), artifact))
            elif artifact.manifest.stage == "compare":
                picture = data_uri(artifact.read_bytes("comparison.png"), "image/png")
                sections["curves"].append(
                    evaluation_page.Picture(name, "Headline scores of teachers while training.", picture)
                )
            advance(note=name)
    sections["bars"] = make_bars({each.name: each.rows for each in sections["scores"]})
    sections["headline"] = _headline(sections)
    lineage = ancestors(each.as_ref() for each in artifacts.values())
    html = render(config, sections, lineage, artifacts)
    (directory / PAGE).write_text(html, encoding="utf-8")
    return {"bytes": len(html.encode()), "stages": len(artifacts)}


def _headline(sections: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The run in a line: images found and kept, backbones, and the largest gain."""
    facts = []
    if sections["funnel"]:
        facts += [(f"{sections['funnel'][0].kept:,}", "images found"), (f"{sections['funnel'][-1].kept:,}", "kept")]
    if sections["scores"]:
        facts.append((str(len(sections["scores"])), "backbones evaluated"))
    firsts = [(each.name, each.gains[0]) for each in sections["scores"] if each.gains]
    if firsts:
        name, best = max(firsts, key=lambda pair: pair[1]["value"] - pair[1]["baseline_value"])
        points = 100 * (best["value"] - best["baseline_value"])
        facts.append((f"{points:+.1f}", f"points of {name} over {best['baseline']} by {best['protocol']}"))
    return facts


def funnel(artifacts: Mapping[str, Artifact]) -> list[Step]:
    """Images found, readable, and left by each step of the pool; selections over other corpora do not count."""
    selections = [each for each in artifacts.values() if each.manifest.kind == "selection"]
    if not selections:
        return []
    pool = selections[0].manifest.inputs["corpus"]
    corpus = find(pool.url)
    first = []
    if corpus is not None:
        rejected = sum(corpus.metrics.get("rejected", {}).values())
        images = corpus.metrics["images"]
        first = [Step("found", images + rejected, 0), Step("readable", images, rejected)]
    of_pool = [each for each in selections if each.manifest.inputs["corpus"].id == pool.id]
    return first + [step for selection in of_pool for step in read_steps(selection)]


def _curves(name: str, artifact: Artifact) -> evaluation_page.Picture:
    steps = metrics_log.parse_rows(artifact.read_bytes(metrics_log.METRICS).decode())
    rows = [metrics_log.select_losses(row) for row in steps if metrics_log.SKIPPED not in row]
    picture = charts.plot_losses({term: [row[term] for row in rows] for term in rows[0]})
    metrics = artifact.metrics
    note = f"{metrics['steps']} steps over {metrics['images']} images, {metrics['parameters']:,} parameters."
    return evaluation_page.Picture(name, note, data_uri(picture, "image/png"))


def render(
    config: ReportConfig, sections: Mapping[str, Any], lineage: list[Ancestor], artifacts: Mapping[str, Artifact]
) -> str:
    """The HTML."""
    names = {artifact.id: name for name, artifact in artifacts.items()}
    return render_template("run", title=config.title, facts=config.facts, lineage=lineage, names=names, **sections)
