"""Every stage as a Prefect flow: configuration in, URL of the artifact out."""

from __future__ import annotations

from prefect import flow

from curation.config import CurateConfig, EmbedConfig, IngestConfig, MaterializeConfig
from distill.config import DistillConfig, PublishConfig
from eval.config import CompareConfig, EvaluateConfig, ReportConfig
from flows.trainings import Room, train_apart
from infra.errors import UserError
from pretrain.config import PretrainConfig


@flow
def ingest(config: IngestConfig) -> str:
    """Images to a corpus."""
    from curation.ingest import ingest as run

    return run(config).url


@flow
def embed(config: EmbedConfig) -> str:
    """A corpus to embeddings."""
    from curation.embed import embed as run

    return run(config).url


@flow
def curate(config: CurateConfig) -> str:
    """A corpus to a selection."""
    from curation import run

    return run(config).url


@flow
def materialize(config: MaterializeConfig) -> str:
    """A selection to a corpus."""
    from curation.curate import materialize as run

    return run(config).url


@flow
def pretrain(config: PretrainConfig) -> str:
    """Corpora to a teacher checkpoint, trained in a process of its own."""
    return _trained("pretrain", config)


@flow
def distill(config: DistillConfig) -> str:
    """A teacher checkpoint to a student checkpoint, trained in a process of its own."""
    return _trained("distill", config)


def _trained(room: Room, config: PretrainConfig | DistillConfig) -> str:
    if not config.launch.slurm.wait:
        raise UserError("launch.slurm.wait: what comes after a training has to wait for it; leave it true")
    return train_apart(room, config)


@flow
def evaluate(config: EvaluateConfig) -> str:
    """A backbone to a report; fails where scores fell further than its gate allows."""
    from flows.evaluation import evaluate as run

    return run(config).url


@flow
def compare(config: CompareConfig) -> str:
    """Reports to one that holds them side by side."""
    from eval.compare import compare as run

    return run(config).url


@flow
def publish(config: PublishConfig) -> str:
    """A checkpoint to a published backbone."""
    from distill.publish import publish as run

    return run(config).url


@flow
def report(config: ReportConfig) -> str:
    """A run to a page."""
    from eval.page import report as run

    return run(config).url
