"""What a run comes to, in numbers: `summary.json` below its root."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curation.synthetic.ground_truth_metrics import score_known_leaks, score_synthetic
from eval.stats.scores import select_headlines
from eval.stats.verdict import MODEL
from flows.config import PipelineConfig
from infra.artifacts.artifact import Artifact, find
from infra.errors import UserError
from infra.storage import filesystem

SUMMARY = "summary.json"


def curation_scores(config: PipelineConfig, urls: dict[str, str], truth: Path | None) -> dict[str, dict[str, float]]:
    """Precision and recall of curation, where the truth is known."""
    if truth is not None:
        return score_synthetic(urls.get("retrieve", urls["deduplicate"]), truth)
    if config.known_leaks is not None:
        known = config.known_leaks
        return {"decontamination": score_known_leaks(urls["deduplicate"], Path(known.table), known.column)}
    return {}


def write(
    config: PipelineConfig, urls: dict[str, str], seconds: dict[str, float], scores: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Collect the summary, write it below the root and return it."""
    artifacts, students = {stage: _artifact(url) for stage, url in urls.items()}, list(config.distill.students)
    reports = {name: artifacts[f"evaluate-{name}"] for name in ("teacher", *students)}
    content = {
        **scores,
        "evaluation": _evaluation(reports),
        "verdicts": {name: report.read_json("report.json")["verdict"] for name, report in reports.items()},
        "publish": {name: artifacts[f"publish-{name}"].metrics["max_abs_diff"] for name in students},
        "artifacts": {stage: {"id": each.id, "url": each.url} for stage, each in artifacts.items()},
        "seconds": _production_facts(config, artifacts, seconds),
        "config": config.settings(),
    }
    filesystem.write_atomic(filesystem.join(config.root, SUMMARY), json.dumps(content, indent=2).encode())
    return content


def _production_facts(
    config: PipelineConfig, artifacts: dict[str, Artifact], seconds: dict[str, float]
) -> dict[str, float]:
    """Seconds that each artifact took to make: of an earlier run where that made it and this one found it."""
    earlier = filesystem.join(config.root, SUMMARY)
    if not filesystem.exists(earlier):
        return seconds
    before = json.loads(filesystem.read_bytes(earlier))
    found = {stage for stage, each in artifacts.items() if before["artifacts"].get(stage, {}).get("id") == each.id}
    return {stage: before["seconds"][stage] if stage in found else value for stage, value in seconds.items()}


def _artifact(url: str) -> Artifact:
    artifact = find(url)
    if artifact is None:
        raise UserError(f"{url}: the artifact is gone; run the pipeline again")
    return artifact


def _evaluation(reports: Mapping[str, Artifact]) -> dict[str, dict[str, Any]]:
    """The headline of each protocol: metric, whether it is a share, the score of each backbone, that of its untrained
    network, and that of raw pixels.

    Args:
        reports: by the backbone's name.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, report in reports.items():
        for row in select_headlines(report.read_json("report.json")["rows"]):
            entry = {
                "metric": row["metric"],
                "is_fraction": row["is_fraction"],
                "values": {},
                "untrained": {},
                "pixels": None,
            }
            scores = found.setdefault(row["protocol"], entry)
            if row["model"] == "pixels":
                scores["pixels"] = row["value"]
            else:
                scores["values" if row["model"] == MODEL else "untrained"][name] = row["value"]
    return found
