"""A run of a pipeline while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flows.config import PipelineConfig
from flows.orchestration.existing import StageConfig, find_stage_output
from infra.storage import filesystem


class ArtifactMissingError(Exception):
    """A pipeline needs an artifact that does not exist yet."""


def find_only(config: StageConfig) -> str:
    """URL of an artifact that exists.

    Raises:
        ArtifactMissingError: it does not.
    """
    artifact = find_stage_output(config)
    if artifact is None:
        raise ArtifactMissingError
    return artifact.url


@dataclass
class PipelineRun:
    """Where a pipeline's artifacts go, and which it has so far."""

    config: PipelineConfig
    get_stage_output: Callable[[StageConfig], str]
    """Makes the artifact that a stage's configuration asks for, or finds it; returns its URL"""
    record: str | None = None
    """URL of a file that keeps the corpora of this run for when it goes on after a crash"""
    urls: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def out(self, stage: str) -> str:
        """Where a stage writes: below the root, by stage and id."""
        return filesystem.join(self.config.root, stage, "{id}")

    def run(self, stage: str, config: StageConfig) -> str:
        """Make or find the artifact of a stage and note it; return its URL."""
        return self.stage_finished(stage, self.get_stage_output(config))

    def stage_finished(self, stage: str, url: str) -> str:
        """Note a finished stage; return its artifact's URL."""
        now = time.monotonic()
        self.urls[stage], self.seconds[stage], self._last = url, round(now - self._last, 1), now
        return url
