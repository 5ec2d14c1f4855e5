"""Curate: steps over a corpus to a selection."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curation.config import CurateConfig
from curation.inputs import SCRATCH, STATE, Inputs, require_same_backbone
from curation.steps.config import referenced_files
from curation.thresholds import with_thresholds
from infra.artifacts.artifact import Artifact, ArtifactSpec, get_or_create
from infra.artifacts.manifest import ArtifactRef
from infra.hashing import hash_url

VERSION = 5


def curate(config: CurateConfig) -> Artifact:
    """Apply the steps in order; return the selection artifact. An interrupted one goes on from its last finished step.

    Raises:
        UserError: an input is missing or belongs to another corpus, or a step leaves nothing.
    """
    resolved, inputs = _resolve(config)

    def write(directory: Path) -> Mapping[str, Any]:
        from curation.steps.run import select

        return select(resolved, inputs, directory)

    return get_or_create(_spec(resolved, inputs), config.out, write, [STATE, f"{SCRATCH}/*"], config.restart)


def selection_spec(config: CurateConfig) -> ArtifactSpec:
    """The selection that a configuration asks for.

    Raises:
        UserError: an input is missing or belongs to another corpus.
    """
    return _spec(*_resolve(config))


def _resolve(config: CurateConfig) -> tuple[CurateConfig, Inputs]:
    """The configuration with the thresholds that hold for its embeddings, and what it reads."""
    inputs = Inputs.open(config)
    config = config.model_copy(update={"steps": with_thresholds(config.steps, inputs.embeddings)})
    if inputs.previous is not None:
        require_same_backbone(inputs.previous, VERSION, config.identity_settings()["steps"], inputs.embeddings)
    return config, inputs


def _spec(config: CurateConfig, inputs: Inputs) -> ArtifactSpec:
    return ArtifactSpec("selection", "curate", VERSION, config.identity_settings(), inputs.by_name() | _listed(config))


def _listed(config: CurateConfig) -> dict[str, ArtifactRef]:
    """The files that steps read: their content is an input like any other."""
    files = {
        f"step_{number}_{name}": url for number, step in enumerate(config.steps) for name, url in referenced_files(step)
    }
    return {name: ArtifactRef(id=hash_url(url)[1], url=url) for name, url in files.items()}
