"""The whole pipeline as a Prefect flow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import flow
from prefect.runtime import deployment, flow_run

from flows import stages
from flows.checkpoint_eval import evaluating_checkpoints
from flows.config import CheckpointEvalConfig, PipelineConfig
from flows.pipeline_stages import run_stages
from flows.running import Run
from infra import storage
from infra.artifacts import cache_directory
from pretrain.config import PretrainConfig
from pretrain.specs import checkpoint_spec


@flow(name="fovea-pipeline")
def pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Ingest, embed, deduplicate, retrieve, pretrain, evaluate, distill, evaluate, publish, report.

    Returns:
        The summary that is also written to `summary.json` below the root.
    """
    return run_stages(Run(config, stages.run, record_of(config)), evaluate_beside)


def record_of(config: PipelineConfig) -> str | None:
    """Where the corpora of this run of a deployment are kept; None where it is no deployment's."""
    return None if deployment.id is None else storage.join(config.root, "runs", f"{flow_run.id}.json")


@contextmanager
def evaluate_beside(
    config: CheckpointEvalConfig, training: PretrainConfig, deployment: str | None
) -> Iterator[list[str]]:
    """Score the teachers of a pretraining while it goes on, beside it or on the worker of a deployment."""
    folder = cache_directory() / "checkpoint-eval" / checkpoint_spec(training).id
    with evaluating_checkpoints(config, folder, deployment) as comparison:
        yield comparison
