"""Curation by itself, on a schedule: what it leaves is trained on when enough of it has changed."""

from __future__ import annotations

from prefect import flow
from prefect.events import emit_event
from prefect.logging import get_run_logger

from flows import curating, stages
from flows.config import PipelineConfig
from flows.growing import changed_share, note_training
from flows.pipeline import record_of
from flows.running import Run
from infra.hashing import hash_json

CHANGED = "fovea.selection.changed"
"""The event of a selection that is no longer what was trained on."""


@flow(name="fovea-curation")
def curation(config: PipelineConfig, changed: float = 0.05) -> float:
    """Ingest, embed and curate; of a pool that grows (`incremental`) only what is new.

    Args:
        changed: share of the selection that must differ from what was last trained on for the event to be sent.

    Returns:
        That share.
    """
    run = Run(config, stages.run, record_of(config))
    sources, _ = curating.sources(config)
    corpora = curating.ingest(run, sources)
    selection = curating.curate(run, corpora)
    share = changed_share(config.root, selection)
    get_run_logger().info("%.1f %% of the selection differ from what was last trained on", 100 * share)
    if share >= changed:
        note_training(config.root, selection)  # now: the run that this starts may have to wait for another
        emit_event(CHANGED, resource=resource(config.root), payload={"share": share})
    return share


def resource(root: str) -> dict[str, str]:
    """How the event names what it is about."""
    return {"prefect.resource.id": f"fovea.root.{hash_json(root)[:16]}", "prefect.resource.name": root}
