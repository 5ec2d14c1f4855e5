"""Curation by itself, on a schedule: what it leaves is trained on when enough of it has changed."""

from __future__ import annotations

from prefect import flow
from prefect.events import emit_event
from prefect.logging import get_run_logger

from flows import curation_stages
from flows.config import PipelineConfig
from flows.incremental_state import changed_fraction, record_training
from flows.orchestration import stages
from flows.orchestration.pipeline import record_of
from flows.orchestration.pipeline_run import PipelineRun
from infra.hashing import hash_json

CHANGED = "fovea.selection.changed"
"""The event of a selection that is no longer what was trained on."""


@flow(name="fovea-curation")
def run_scheduled_curation(config: PipelineConfig, min_change: float = 0.05) -> float:
    """Ingest, embed and curate; of a pool that grows (`incremental`) only what is new.

    Args:
        changed: share of the selection that must differ from what was last trained on for the event to be sent.

    Returns:
        That share.
    """
    run = PipelineRun(config, stages.run, record_of(config))
    sources, _ = curation_stages.ingest_sources(config)
    corpora = curation_stages.ingest(run, sources)
    selection = curation_stages.curate(run, corpora)
    share = changed_fraction(config.root, selection)
    get_run_logger().info("%.1f %% of the selection differ from what was last trained on", 100 * share)
    if share >= min_change:
        record_training(config.root, selection)  # now: the run that this starts may have to wait for another
        emit_event(CHANGED, resource=resource(config.root), payload={"share": share})
    return share


def resource(root: str) -> dict[str, str]:
    """How the event names what it is about."""
    return {"prefect.resource.id": f"fovea.root.{hash_json(root)[:16]}", "prefect.resource.name": root}
