"""All artifacts under a root, read from their manifests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from eval.stats.scores import select_headlines
from infra.artifacts.artifact import Artifact, find
from infra.artifacts.staging import MANIFEST
from infra.errors import UserError
from infra.storage import filesystem

_FRESH_SECONDS = 5.0
_STAMPS = ("size", "mtime_ns", "ETag", "etag", "LastModified")


@dataclass
class Catalog:
    """What lies under a root, looked at again when somebody asks some seconds later.

    Args:
        root: URL of a folder of runs.
    """

    root: str
    _known: dict[str, tuple[tuple[Any, ...], Artifact | None]] = field(default_factory=dict)
    """By URL: what tells one state of the manifest from another, and the artifact if it can be read"""
    _reports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Headline rows by the id of a report: an artifact does not change"""
    _looked: float = -_FRESH_SECONDS
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def artifacts(self) -> list[Artifact]:
        """All of them, the newest first; where several places hold the same one, the first place.

        Raises:
            UserError: the root is not there.
        """
        with self._lock:
            if time.monotonic() - self._looked >= _FRESH_SECONDS:
                self._refresh()
                self._looked = time.monotonic()
            found = [artifact for _, (_, artifact) in sorted(self._known.items()) if artifact is not None]
        unique = {artifact.id: artifact for artifact in reversed(found)}
        return sorted(unique.values(), key=lambda each: (each.manifest.created, each.url), reverse=True)

    def unreadable(self) -> list[str]:
        """URLs whose manifests this version cannot read."""
        return sorted(url for url, (_, artifact) in self._known.items() if artifact is None)

    def get(self, id: str) -> Artifact | None:
        """The artifact of an id."""
        return next((each for each in self.artifacts() if each.id == id), None)

    def find(self, id: str) -> Artifact | None:
        """The artifact of an id, also one that lies elsewhere and is an input of one under the root."""
        if (known := self.get(id)) is not None:
            return known
        inputs = (source for each in self.artifacts() for source in each.manifest.inputs.values())
        place = next((source.url for source in inputs if source.id == id), None)
        found = None if place is None else find(place)
        return found if found is not None and found.id == id else None

    def children_of(self, id: str) -> list[Artifact]:
        """What has an artifact among its inputs."""
        return [each for each in self.artifacts() if any(source.id == id for source in each.manifest.inputs.values())]

    def headlines(self, report: Artifact) -> list[dict[str, Any]]:
        """The first row of each protocol and model of an evaluation; none of what another version made."""
        if report.id not in self._reports:
            try:
                rows = select_headlines(report.read_json("report.json")["rows"])
            except (UserError, KeyError, TypeError, ValueError):
                rows = []
            self._reports[report.id] = [dict(row) for row in rows]
        return self._reports[report.id]

    def _refresh(self) -> None:
        listed = filesystem.list_files(self.root)
        seen = {}
        for path, details in _manifests(listed.items()):
            url = filesystem.join(self.root, path.removesuffix(MANIFEST).rstrip("/")) if "/" in path else self.root
            stamp = tuple(str(details.get(name)) for name in _STAMPS)
            before = self._known.get(url)
            seen[url] = before if before is not None and before[0] == stamp else (stamp, _read(url))
        self._known = seen


def _manifests(files: Iterable[tuple[str, dict[str, Any]]]) -> Iterable[tuple[str, dict[str, Any]]]:
    return (each for each in files if each[0].rpartition("/")[2] == MANIFEST)


def _read(url: str) -> Artifact | None:
    try:
        return find(url)
    except UserError:
        return None


def size_of(artifact: Artifact) -> int:
    """Bytes of its files."""
    return sum(file.bytes for file in artifact.manifest.files)


def describe_artifact(artifact: Artifact) -> str:
    """An artifact in a few words: how much there is of it, or how good it is; none for what another version made."""
    try:
        return _words(artifact)
    except (KeyError, TypeError, ValueError):
        return ""


def _words(artifact: Artifact) -> str:
    metrics, kind = artifact.metrics, artifact.manifest.kind
    if kind == "selection":
        return f"{metrics['kept']:,} of {metrics['images']:,} images kept"
    if kind == "embeddings":
        width = f" of {metrics['dim']} numbers" if "dim" in metrics else ""
        return f"{metrics['images']:,} vectors{width}"
    if kind == "checkpoint" and "steps" in metrics:
        return f"{metrics['parameters']:,} parameters, {metrics['steps']:,} steps"
    if artifact.manifest.stage == "evaluate":
        return ", ".join(f"{name} {told['model']:.3f}" for name, told in read_scores(artifact).items())
    if artifact.manifest.stage == "report":
        return f"{artifact.manifest.config.get('title', 'run')}: {metrics['stages']} stages"
    counted = {"images": "images", "parameters": "parameters"}
    return ", ".join(f"{metrics[name]:,} {unit}" for name, unit in counted.items() if name in metrics)


def read_scores(report: Artifact) -> dict[str, dict[str, float]]:
    """Headline scores of an evaluation by protocol and model."""
    return {name: told for name, told in report.metrics.items() if isinstance(told, dict) and "model" in told}
