"""Big teacher to small backbones, and backbones to the tools people use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.config import DistillConfig
    from infra.artifacts.artifact import Artifact


def run(config: DistillConfig) -> Artifact:
    """Distill a student; see `distill.train.distill.distill`."""
    from distill.train.distill import distill

    return distill(config)
