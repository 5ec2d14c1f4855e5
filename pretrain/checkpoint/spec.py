"""Which checkpoint a pretraining makes: found, refused or locked before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence

from infra.artifacts.artifact import ArtifactSpec, open_artifact
from infra.artifacts.manifest import ArtifactRef
from pretrain.config import PretrainConfig, identity_settings

VERSION = 6


def checkpoint_spec(config: PretrainConfig) -> ArtifactSpec:
    """The checkpoint that a configuration asks for.

    Raises:
        UserError: a corpus or the checkpoint to start from is missing.
    """
    start = {"init_from": open_artifact(config.init_from, "checkpoint").as_ref()} if config.init_from else {}
    return ArtifactSpec(
        "checkpoint", "pretrain", VERSION, identity_settings(config), corpus_inputs(config.corpora) | start
    )


def corpus_inputs(urls: Sequence[str]) -> dict[str, ArtifactRef]:
    """Corpora or selections as inputs of a training, by their places."""
    return {f"corpus_{i}": open_artifact(url, "corpus", "selection").as_ref() for i, url in enumerate(urls)}
