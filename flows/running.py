"""A run of a pipeline while it goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from flows.config import PipelineConfig
from infra import storage


@dataclass
class Run:
    """Where a pipeline's artifacts go, and which it has so far."""

    config: PipelineConfig
    urls: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def out(self, stage: str) -> str:
        """Where a stage writes: below the root, by stage and id."""
        return storage.join(self.config.root, stage, "{id}")

    def done(self, stage: str, url: str) -> str:
        """Note a finished stage; return its artifact's URL."""
        now = time.monotonic()
        self.urls[stage], self.seconds[stage], self._last = url, round(now - self._last, 1), now
        return url
