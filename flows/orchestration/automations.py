"""What the server does by itself for deployed runs: those of lost workers go on, and people are told of failures."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.exceptions import ObjectNotFound

from flows.config import DeploySettings
from infra.errors import UserError

ATTEMPTS = 10
"""How often a run that crashed is started again."""
MISSED_HEARTBEATS = 3
"""Signs of life that may be missing before a run is taken for dead."""
_ONCE = timedelta(days=365)  # of a reactive trigger: it does not fire again in that time for the same labels
_ENDED = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
_NOTIFY_FAILURES = "notify-failures"
_BODY = """{{ flow.name }} {{ flow_run.name }} is {{ flow_run.state.name }}: {{ flow_run.state.message }}
{{ flow_run|ui_url }}"""


def build_automations(
    settings: DeploySettings, deployments: Sequence[UUID], block: UUID | None
) -> list[AutomationCore]:
    """The automations of a deployment.

    Args:
        deployments: those whose runs are looked after.
        block: the notification block that is told, if any.
    """
    found = [_mark_silent_crashed(settings, deployments), _retry_crashed(settings, deployments)]
    return found if block is None else [*found, _notify_failures(settings, deployments, block)]


def apply(settings: DeploySettings, client: SyncPrefectClient) -> None:
    """Make the automations, or change those of the same name.

    Raises:
        UserError: the notification block is not there.
    """
    block = _find_block(settings.notification_block, client) if settings.notification_block else None
    ours = DeploymentFilter(name=DeploymentFilterName(any_=[settings.name]))
    deployments = [each.id for each in client.read_deployments(deployment_filter=ours)]
    known = {each.name: each.id for each in client.read_automations()}
    made = build_automations(settings, deployments, block)
    if block is None and (told := known.get(_name(settings, _NOTIFY_FAILURES))) is not None:
        client.delete_automation(told)
    for each in made:
        if each.name in known:
            client.update_automation(known[each.name], each)
        else:
            client.create_automation(each)


def _mark_silent_crashed(settings: DeploySettings, deployments: Sequence[UUID]) -> AutomationCore:
    """A run whose process is gone says nothing: nobody else notices that it is."""
    trigger = EventTrigger(
        posture=Posture.Proactive,
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *_ENDED},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=_match_deployments(deployments),
        for_each={"prefect.resource.id"},
        threshold=1,
        within=timedelta(seconds=MISSED_HEARTBEATS * settings.heartbeat_seconds),
    )
    action = ChangeFlowRunState(state=StateType.CRASHED, message="no sign of life: its worker or machine is gone")
    return AutomationCore(name=_name(settings, "mark-silent-crashed"), trigger=trigger, actions=[action])


def _retry_crashed(settings: DeploySettings, deployments: Sequence[UUID]) -> AutomationCore:
    """What a crashed run has made is found by its id: the same run, started again, goes on from there.

    Once for each attempt that began: one whose process never came up would crash again at once, and for ever.
    """
    attempts = [str(number) for number in range(1, ATTEMPTS + 1)]
    trigger = EventTrigger(
        posture=Posture.Reactive,
        expect={"prefect.flow-run.Crashed"},
        match={"prefect.resource.id": "prefect.flow-run.*", "prefect.run-count": attempts},
        match_related=_match_deployments(deployments),
        for_each={"prefect.resource.id", "prefect.run-count"},
        threshold=1,
        within=_ONCE,
    )
    action = ChangeFlowRunState(
        state=StateType.SCHEDULED, name="AwaitingRetry", message="resumes from finished stages", force=True
    )
    return AutomationCore(name=_name(settings, "retry-crashed"), trigger=trigger, actions=[action])


def _notify_failures(settings: DeploySettings, deployments: Sequence[UUID], block: UUID) -> AutomationCore:
    """A regression fails its run, so it is told like every failure, in its own words."""
    trigger = EventTrigger(
        posture=Posture.Reactive,
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut"},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=_match_deployments(deployments),
        threshold=1,
        within=timedelta(0),
    )
    action = SendNotification(block_document_id=block, subject="{{ flow.name }} {{ flow_run.state.name }}", body=_BODY)
    return AutomationCore(name=_name(settings, _NOTIFY_FAILURES), trigger=trigger, actions=[action])


def _name(settings: DeploySettings, what: str) -> str:
    return f"{settings.name}: {what}"


def _match_deployments(deployments: Sequence[UUID]) -> dict[str, str | list[str]]:
    return {
        "prefect.resource.role": "deployment",
        "prefect.resource.id": [f"prefect.deployment.{each}" for each in deployments],
    }


def _find_block(slug: str, client: SyncPrefectClient) -> UUID:
    kind, _, name = slug.partition("/")
    try:
        return client.read_block_document_by_name(name, kind, include_secrets=False).id
    except ObjectNotFound:
        raise UserError(
            f"notification_block: the server has no block {slug}; prefect block ls lists those it has"
        ) from None
