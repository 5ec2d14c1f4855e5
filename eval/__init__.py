"""Backbone to report: kNN, linear probe, pictures, and the page of a whole run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.config import EvaluateConfig
    from infra.artifacts.artifact import Artifact


def run(config: EvaluateConfig) -> Artifact:
    """Evaluate a backbone; see `eval.evaluate.evaluate`."""
    from eval.evaluate import evaluate

    return evaluate(config)
