"""Flows as Prefect deployments: `prefect.yaml`, and how it is applied to a server."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from flows.config import DeploySettings, PipelineConfig
from flows.orchestration import automations
from flows.scheduled_curation import CHANGED, resource
from infra.config import load_yaml
from infra.errors import UserError
from infra.storage import filesystem
from infra.storage.atomic import atomic_write

FILE = "prefect.yaml"
_HEADER = "# Written by `fovea deploy`; a change here is lost when that runs again.\n"
_SCHEDULED = {
    "flows.orchestration.pipeline:pipeline": "fovea-pipeline",
    "flows.scheduled_curation:run_scheduled_curation": "fovea-curation",
}
STAGES = ("ingest", "embed", "curate", "materialize", "pretrain", "distill", "evaluate", "compare", "publish", "report")


def build_prefect_yaml(settings: DeploySettings) -> dict[str, Any]:
    """What stands in `prefect.yaml`: the pipeline with its parameters, and every stage, which gets its own at each run.

    Parameters hold what the pipeline's file holds: variables of the environment are the worker's.

    Raises:
        UserError: the pipeline's file is missing or wrong.
    """
    pipeline = load_yaml(settings.pipeline) | ({"root": settings.root} if settings.root else {})
    root = PipelineConfig.model_validate(pipeline).root
    if filesystem.is_local(root) and not Path(root).is_absolute():
        raise UserError(f"root: {root} is relative, but a worker runs elsewhere; give --root, a bucket or a whole path")
    variables = dict(settings.job_variables)
    own = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(settings.heartbeat_seconds), "DO_NOT_TRACK": "1"}
    variables["env"] = own | variables.get("env", {})
    shared: dict[str, Any] = {
        "version": importlib.metadata.version("fovea"),
        "tags": ["fovea", *settings.tags],
        "work_pool": {"name": settings.work_pool, "job_variables": variables},
        "enforce_parameter_schema": True,
    }
    whole = shared | {
        "name": settings.name,
        "entrypoint": "flows.orchestration.pipeline:pipeline",
        "description": "Ingest, embed, curate, pretrain, evaluate, distill, publish, report.",
        "parameters": {"config": pipeline},
        # Two runs of one pipeline would wait for each other's artifacts; the second is better queued.
        "concurrency_limit": 1,
    }
    curation = shared | {
        "name": settings.name,
        "entrypoint": "flows.scheduled_curation:run_scheduled_curation",
        "description": "Ingest, embed, curate; notify the server if the training images change.",
        "parameters": {"config": pipeline, "min_change": settings.min_change or 1.0},
        "concurrency_limit": 1,
    }
    if settings.min_change is not None:
        whole["triggers"] = [{"expect": [CHANGED], "match": resource(root)}]
    if settings.cron is not None:
        scheduled = whole if settings.min_change is None else curation
        scheduled["schedules"] = [{"cron": settings.cron, "timezone": settings.timezone}]
    stages = [shared | {"name": settings.name, "entrypoint": f"flows.orchestration.stages:{stage}"} for stage in STAGES]
    checkpoint_eval = shared | {"name": settings.name, "entrypoint": "flows.checkpoint_eval:eval_checkpoints"}
    return {
        "prefect-version": importlib.metadata.version("prefect"),
        "deployments": [whole, curation, *stages, checkpoint_eval],
    }


def write(settings: DeploySettings) -> Path:
    """Write `prefect.yaml` into the working folder; return its path.

    Raises:
        UserError: a file that `fovea deploy` has not written is in its place.
    """
    path = Path(settings.file)
    if path.exists() and not path.read_text().startswith(_HEADER):
        raise UserError(f"{path}: is not of fovea deploy; give another --file")
    plain = json.loads(json.dumps(build_prefect_yaml(settings)))  # what is shared would be written as references
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    with atomic_write(path.absolute(), 0o644) as partial:
        partial.write_text(_HEADER + text)
    return path


def remove_schedules(settings: DeploySettings, client: SyncPrefectClient) -> None:
    """Take away schedules that an earlier file gave to flows which have none now: Prefect leaves them."""
    for each in build_prefect_yaml(settings)["deployments"]:
        if "schedules" not in each and each["entrypoint"] in _SCHEDULED:
            found = client.read_deployment_by_name(f"{_SCHEDULED[each['entrypoint']]}/{settings.name}")
            for schedule in found.schedules:
                client.delete_deployment_schedule(found.id, schedule.id)


def _template(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}  # the worker brings its own
    try:
        return dict(json.loads(Path(path).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"template: {path}: {error}; give a JSON file") from None


def apply(settings: DeploySettings, path: Path) -> None:
    """Make the work pool, if it is not there, register what a file says, and the automations that look after its runs.

    Raises:
        UserError: no server is named, or it refuses.
    """
    if not PREFECT_API_URL.value():
        raise UserError("deploy: PREFECT_API_URL is not set; run prefect server start and set it to the printed URL")
    with get_client(sync_client=True) as client:
        try:
            found = client.read_work_pool(settings.work_pool)
            if found.type != settings.work_pool_type:
                raise UserError(
                    f"work_pool: {settings.work_pool} is of type {found.type}; give --work-pool-type {found.type}"
                )
        except ObjectNotFound:
            template = _template(settings.base_job_template)
            client.create_work_pool(
                WorkPoolCreate(name=settings.work_pool, type=settings.work_pool_type, base_job_template=template)
            )
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise UserError(f"deploy: prefect refuses: {(lines or ['no reason given'])[-1].strip()}")
    with get_client(sync_client=True) as client:
        remove_schedules(settings, client)
        automations.apply(settings, client)
