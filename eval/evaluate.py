"""Evaluate: a backbone and its baselines by a list of protocols, to a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.config import EvaluateConfig
from eval.context import EvalContext
from eval.protocols.files import referenced_files
from infra.artifacts.artifact import Artifact, ArtifactSpec, get_or_create
from infra.notices import print_loading
from pretrain.backbones.identity import backbone_identity

VERSION = 5
_HOW = {"model", "datasets", "leaks", "features", "out", "restart", "batch", "workers", "gate", "suite"}
DONE = ".done"
"""Folder of what an interrupted evaluation has scored."""


def evaluate(config: EvaluateConfig) -> Artifact:
    """Score a backbone; return the report artifact. What was scored before an interruption is not scored again.

    Raises:
        UserError: the backbone or a dataset is missing, or does not fit a task.
    """
    bench = EvalContext.open(config)

    def write(directory: Path) -> Mapping[str, Any]:
        print_loading("evaluate", "torch")
        from eval.scoring import score_all

        return score_all(config, bench, directory)

    return get_or_create(_spec(config, bench), config.out, write, [f"{DONE}/*.json"], config.restart)


def report_spec(config: EvaluateConfig) -> ArtifactSpec:
    """The report that a configuration asks for.

    Raises:
        UserError: the backbone, a dataset or a file that a task reads is missing.
    """
    return _spec(config, EvalContext.open(config))


def _spec(config: EvaluateConfig, context: EvalContext) -> ArtifactSpec:
    model, inputs = backbone_identity(config.model)
    settings = config.model_dump(mode="json", exclude=_HOW) | {"model": model, "left_out": config.left_out()}
    settings |= {"files": referenced_files(config.runnable(), config.datasets)}
    return ArtifactSpec("report", "evaluate", VERSION, settings, {**inputs, **context.inputs})
