"""What the server says about a run: whether it is being cancelled, and how many GPUs it may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.runtime import flow_run

from infra.errors import UserError

_ENDING = {StateType.CANCELLING, StateType.CANCELLED}


def is_being_cancelled() -> bool:
    """Whether somebody cancels the run that this process belongs to; False outside of one, or if nobody can tell."""
    run = flow_run.root_flow_run_id
    if run is None:
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(run)).state
    except (httpx.HTTPError, PrefectException):
        return False
    return state is not None and state.type in _ENDING


@contextmanager
def hold_slots(limit: str, count: int) -> Iterator[None]:
    """Wait for slots of a global concurrency limit and hold them; who loses the server keeps them.

    Raises:
        UserError: there is no such limit, or it never has so many.
    """
    with get_client(sync_client=True) as client:
        try:
            found = client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            remedy = f"make it: prefect gcl create {limit} --limit GPUS"
            raise UserError(
                f"launch.concurrency_limit: the server has no concurrency limit {limit}; {remedy}"
            ) from None
    if found.limit < count:
        raise UserError(
            f"launch.concurrency_limit: {limit} has {found.limit} slots, the training has {count} ranks; take fewer"
        )
    with concurrency(limit, occupy=count, strict=True, raise_on_lease_renewal_failure=False):
        yield
