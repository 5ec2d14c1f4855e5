"""Corpus to teacher checkpoint: models, objectives, data and the training engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infra.artifacts.artifact import Artifact
    from pretrain.config import PretrainConfig
    from pretrain.monitoring.reporter import Probe


def run(config: PretrainConfig, probe: Probe | None = None) -> Artifact:
    """Pretrain a backbone; see `pretrain.train.pretrain`."""
    from pretrain.train import pretrain

    return pretrain(config, probe)
