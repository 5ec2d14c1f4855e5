"""Curation by itself, on a schedule: what it leaves is trained on when enough of it has changed."""

from __future__ import annotations

import json

from prefect import flow
from prefect.events import emit_event
from prefect.logging import get_run_logger

from flows import curating
from flows.config import PipelineConfig
from flows.growing import changed_share
from flows.limits import require_few_crashes
from flows.running import Run
from flows.summary import SUMMARY
from infra import storage
from infra.hashing import hash_json

CHANGED = "fovea.selection.changed"
"""The event of a selection that is no longer what was trained on."""


@flow(name="fovea-curation")
def curation(config: PipelineConfig, changed: float = 0.05) -> float:
    """Ingest, embed and curate; of a pool that grows (`grows`) only what is new.

    Args:
        changed: share of the selection that must differ from what was last trained on for the event to be sent.

    Returns:
        That share.
    """
    require_few_crashes()
    run = Run(config)
    sources, _ = curating.sources(config)
    corpora = curating.ingest(run, sources)
    share = changed_share(_trained_on(config), curating.curate(run, corpora))
    get_run_logger().info("%.1f %% of the selection differ from what was last trained on", 100 * share)
    if share >= changed:
        emit_event(CHANGED, resource=resource(config.root), payload={"share": share})
    return share


def resource(root: str) -> dict[str, str]:
    """How the event names what it is about."""
    return {"prefect.resource.id": f"fovea.root.{hash_json(root)[:16]}", "prefect.resource.name": root}


def _trained_on(config: PipelineConfig) -> str | None:
    """URL of the selection that the last whole run under this root trained on."""
    place = storage.join(config.root, SUMMARY)
    if not storage.exists(place):
        return None
    artifacts = json.loads(storage.read_bytes(place))["artifacts"]
    return str(artifacts.get("retrieve", artifacts["deduplicate"])["url"])
