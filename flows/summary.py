"""What a run comes to, in numbers: `summary.json` below its root."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from curation.scoring import score_embedded, score_known_leaks
from flows.config import PipelineConfig
from infra import storage
from infra.artifacts import Artifact, find
from infra.errors import UserError

SUMMARY = "summary.json"


def curation_scores(config: PipelineConfig, urls: dict[str, str], truth: Path | None) -> dict[str, dict[str, float]]:
    """Precision and recall of curation, where the truth is known."""
    if truth is not None:
        return score_embedded(urls.get("retrieve", urls["deduplicate"]), truth)
    if config.known_leaks is not None:
        known = config.known_leaks
        return {"decontamination": score_known_leaks(urls["deduplicate"], Path(known.table), known.column)}
    return {}


def write(
    config: PipelineConfig, urls: dict[str, str], seconds: dict[str, float], scores: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Collect the summary, write it below the root and return it."""
    artifacts = {stage: _artifact(url) for stage, url in urls.items()}
    teacher, student = (artifacts[f"evaluate-{who}"].metrics for who in ("teacher", "student"))
    content = {
        **scores,
        **{protocol: _accuracies(teacher[protocol], student[protocol]) for protocol in ("knn", "linear")},
        "publish": {"timm_max_abs_diff": artifacts["publish"].metrics["timm_max_abs_diff"]},
        "artifacts": {stage: {"id": each.id, "url": each.url} for stage, each in artifacts.items()},
        "seconds": _making(config, artifacts, seconds),
        "config": config.settings(),
    }
    storage.write_atomic(storage.join(config.root, SUMMARY), json.dumps(content, indent=2).encode())
    return content


def _making(config: PipelineConfig, artifacts: dict[str, Artifact], seconds: dict[str, float]) -> dict[str, float]:
    """Seconds that each artifact took to make: of an earlier run where that made it and this one found it."""
    earlier = storage.join(config.root, SUMMARY)
    if not storage.exists(earlier):
        return seconds
    before = json.loads(storage.read_bytes(earlier))
    found = {stage for stage, each in artifacts.items() if before["artifacts"].get(stage, {}).get("id") == each.id}
    return {stage: before["seconds"][stage] if stage in found else value for stage, value in seconds.items()}


def _artifact(url: str) -> Artifact:
    artifact = find(url)
    if artifact is None:
        raise UserError(f"{url}: the artifact is gone; run the pipeline again")
    return artifact


def _accuracies(teacher: dict[str, float], student: dict[str, float]) -> dict[str, float]:
    names = {"teacher": teacher.get("model"), "student": student.get("model")}
    names |= {baseline: teacher.get(baseline) for baseline in ("untrained", "pixels")}
    return {name: value for name, value in names.items() if value is not None}
