"""The whole pipeline as a Prefect flow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import flow
from prefect.runtime import deployment, flow_run

from flows.checkpoint_eval import evaluate_in_background
from flows.config import CheckpointEvalConfig, PipelineConfig
from flows.orchestration import stages
from flows.orchestration.pipeline_run import PipelineRun
from flows.orchestration.pipeline_stages import run_stages
from infra.artifacts.artifact import cache_directory
from infra.storage import filesystem
from pretrain.checkpoint.spec import checkpoint_spec
from pretrain.config import PretrainConfig


@flow(name="fovea-pipeline")
def pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Ingest, embed, deduplicate, retrieve, pretrain, evaluate, distill, evaluate, publish, report.

    Returns:
        The summary that is also written to `summary.json` below the root.
    """
    return run_stages(PipelineRun(config, stages.run, record_of(config)), evaluate_beside)


def record_of(config: PipelineConfig) -> str | None:
    """Where the corpora of this run of a deployment are kept; None where it is no deployment's."""
    return None if deployment.id is None else filesystem.join(config.root, "runs", f"{flow_run.id}.json")


@contextmanager
def evaluate_beside(
    config: CheckpointEvalConfig, training: PretrainConfig, deployment: str | None
) -> Iterator[list[str]]:
    """Score the teachers of a pretraining while it goes on, beside it or on the worker of a deployment."""
    folder = cache_directory() / "checkpoint-eval" / checkpoint_spec(training).id
    with evaluate_in_background(config, folder, deployment) as comparison:
        yield comparison
