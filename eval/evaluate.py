"""Evaluate: a backbone and its baselines by a list of protocols, to a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.bench import Bench
from eval.config import EvaluateConfig
from eval.tasks.files import files_of
from infra.artifacts import Artifact, ArtifactSpec, produce
from infra.notices import say_loading
from pretrain.identity import identity

VERSION = 4
_HOW = {"model", "datasets", "leaks", "features", "out", "restart", "batch", "workers", "gate", "suite"}
DONE = ".done"
"""Folder of what an interrupted evaluation has scored."""


def evaluate(config: EvaluateConfig) -> Artifact:
    """Score a backbone; return the report artifact. What was scored before an interruption is not scored again.

    Raises:
        UserError: the backbone or a dataset is missing, or does not fit a task.
    """
    bench = Bench.open(config)

    def write(directory: Path) -> Mapping[str, Any]:
        say_loading("evaluate", "torch")
        from eval.scoring import score

        return score(config, bench, directory)

    return produce(_spec(config, bench), config.out, write, [f"{DONE}/*.json"], config.restart)


def report_spec(config: EvaluateConfig) -> ArtifactSpec:
    """The report that a configuration asks for.

    Raises:
        UserError: the backbone, a dataset or a file that a task reads is missing.
    """
    return _spec(config, Bench.open(config))


def _spec(config: EvaluateConfig, bench: Bench) -> ArtifactSpec:
    model, inputs = identity(config.model)
    settings = config.model_dump(mode="json", exclude=_HOW) | {"model": model, "left_out": config.left_out()}
    settings |= {"files": files_of(config.runnable(), config.datasets)}
    return ArtifactSpec("report", "evaluate", VERSION, settings, {**inputs, **bench.inputs})
