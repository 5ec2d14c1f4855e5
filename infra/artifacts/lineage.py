"""What an artifact was made from, back to the raw data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from infra.artifacts.artifact import find
from infra.artifacts.manifest import ArtifactRef


@dataclass(frozen=True)
class Ancestor:
    """One artifact, or raw data, among the ancestors of another."""

    stage: str
    kind: str
    id: str
    url: str
    inputs: dict[str, str]
    """{role: id}"""
    config: dict[str, Any]
    images: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ancestors(inputs: Iterable[ArtifactRef]) -> list[Ancestor]:
    """All ancestors, each once, every one before what was made from it."""
    by_id: dict[str, Ancestor] = {}

    def visit(each: ArtifactRef) -> None:
        if each.id in by_id:
            return
        artifact = find(each.url)
        if artifact is None or artifact.id != each.id:
            by_id[each.id] = Ancestor("source", "raw data", each.id, each.url, {}, {}, None)
            return
        manifest = artifact.manifest
        for parent in manifest.inputs.values():
            visit(parent)
        made_from = {role: parent.id for role, parent in manifest.inputs.items()}
        images = manifest.metrics.get("images")
        by_id[each.id] = Ancestor(manifest.stage, manifest.kind, each.id, each.url, made_from, manifest.config, images)

    for each in inputs:
        visit(each)
    return list(by_id.values())
