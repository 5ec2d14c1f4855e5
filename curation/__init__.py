"""Corpus to a smaller, better corpus: ingest, embed, curate, materialize."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from curation.config import CurateConfig
    from infra.artifacts.artifact import Artifact


def run(config: CurateConfig) -> Artifact:
    """Curate a corpus; see `curation.curate.curate`."""
    from curation.curate import curate

    return curate(config)
