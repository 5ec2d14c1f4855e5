"""Every stage as a Prefect flow: configuration in, URL of the artifact out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from prefect import flow
from prefect.logging import get_run_logger

from curation.config import CurateConfig, EmbedConfig, IngestConfig, MaterializeConfig
from distill.config import DistillConfig, PublishConfig
from eval.config import CompareConfig, EvaluateConfig, ReportConfig
from flows.orchestration.existing import StageConfig, find_stage_output
from flows.orchestration.prefect_artifacts import publish_stage_artifacts
from flows.training import Room, train_apart
from infra.artifacts.artifact import open_artifact
from infra.config import Output
from infra.errors import ArtifactLockedError, UserError
from pretrain.config import PretrainConfig

T = TypeVar("T")
_BUSY_SECONDS = 30


@flow
def ingest(config: IngestConfig) -> str:
    """Images to a corpus."""
    from curation.ingest.ingest import describe_problems
    from curation.ingest.ingest import ingest as run

    artifact = _retry_locked(lambda: run(config))
    for line in describe_problems(artifact):
        print(line, file=sys.stderr)
    return publish_stage_artifacts("ingest", artifact)


@flow
def embed(config: EmbedConfig) -> str:
    """A corpus to embeddings."""
    from curation.embed import embed as run

    return publish_stage_artifacts("embed", _retry_locked(lambda: run(config)))


@flow
def curate(config: CurateConfig) -> str:
    """A corpus to a selection."""
    from curation import run

    return publish_stage_artifacts("curate", _retry_locked(lambda: run(config)))


@flow
def materialize(config: MaterializeConfig) -> str:
    """A selection to a corpus."""
    from curation.materialize import materialize as run

    return publish_stage_artifacts("materialize", _retry_locked(lambda: run(config)))


@flow
def pretrain(config: PretrainConfig) -> str:
    """Corpora to a teacher checkpoint, trained in a process of its own."""
    return _train("pretrain", config)


@flow
def distill(config: DistillConfig) -> str:
    """A teacher checkpoint to a student checkpoint, trained in a process of its own."""
    return _train("distill", config)


def _retry_locked(make: Callable[[], T]) -> T:
    """What a stage makes; where another run is making the same, that of the other."""
    while True:
        try:
            return make()
        except ArtifactLockedError as busy:
            get_run_logger().info("%s; looked at again every %d s", busy, _BUSY_SECONDS)
            time.sleep(_BUSY_SECONDS)


def _train(room: Room, config: PretrainConfig | DistillConfig) -> str:
    if not config.launch.slurm.wait:
        raise UserError("launch.slurm.wait: later stages need the training's result; leave it true")
    return publish_stage_artifacts(room, open_artifact(_retry_locked(lambda: train_apart(room, config)), "checkpoint"))


@flow
def evaluate(config: EvaluateConfig) -> str:
    """A backbone to a report; fails where scores fell further than its gate allows."""
    from flows.evaluation import evaluate as run

    return publish_stage_artifacts("evaluate", _retry_locked(lambda: run(config)))


@flow
def compare(config: CompareConfig) -> str:
    """Reports to one that holds them side by side."""
    from eval.compare import compare as run

    return publish_stage_artifacts("compare", _retry_locked(lambda: run(config)))


@flow
def publish(config: PublishConfig) -> str:
    """A checkpoint to a published backbone."""
    from distill.export.publish import publish as run

    return publish_stage_artifacts("publish", _retry_locked(lambda: run(config)))


@flow
def report(config: ReportConfig) -> str:
    """A run to a page."""
    from eval.report.run_page import build_report as run

    return publish_stage_artifacts("report", _retry_locked(lambda: run(config)))


_FLOWS: dict[type[Output], Callable[[Any], str]] = {
    IngestConfig: ingest,
    EmbedConfig: embed,
    CurateConfig: curate,
    MaterializeConfig: materialize,
    PretrainConfig: pretrain,
    DistillConfig: distill,
    EvaluateConfig: evaluate,
    PublishConfig: publish,
    ReportConfig: report,
}


def run(config: StageConfig) -> str:
    """URL of the artifact that a configuration asks for: made by a flow of its own, unless it exists.

    Sources are listed once, by the flow of their ingest.
    """
    existing = None if isinstance(config, IngestConfig) else find_stage_output(config)
    return _FLOWS[type(config)](config) if existing is None else existing.url
