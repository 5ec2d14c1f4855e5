"""`fovea doctor`: one page on whether everything that Fovea stands on is there and works."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.orchestration.prefect_settings import set_up_prefect
from infra.compute import vector_search
from infra.doctor import machine
from infra.doctor.finding import Finding, fail, guarded, ok
from pretrain import doctor

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


def findings(storage: str | None) -> Iterator[Finding]:
    """All checks, one after another."""
    yield from machine.packages()
    yield from machine.hardware()
    yield from doctor.gpus()
    yield from doctor.kernels()
    yield guarded("faiss", _faiss, "install faiss-gpu, or faiss-cpu, never both, under constraints.txt")
    if storage is not None:
        yield from machine.reached(storage)
    yield machine.slurm()
    yield guarded("prefect", _prefect, "start a server (prefect server start) and set PREFECT_API_URL to its /api")


def _faiss() -> Finding:
    rng = np.random.default_rng(0)
    queries, bank = (rng.standard_normal((count, 32)).astype(np.float32) for count in (8, 500))
    _, rows = vector_search.knn_search(queries, bank, 3)
    if not np.array_equal(rows[:, 0], (queries @ bank.T).argmax(1)):
        return fail("faiss", "finds other neighbors than plain products", "install faiss again")
    count = vector_search.num_gpus()
    return ok("faiss", f"finds the nearest {f'on {count} GPUs' if count else 'on the CPU'}")


def _prefect() -> Finding:
    set_up_prefect()
    import prefect
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        return ok(
            "prefect", f"{prefect.__version__}, with a server of its own for each run (PREFECT_API_URL is not set)"
        )
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
        if problem is not None:
            raise problem
        version = client.api_version()
        return ok("prefect", f"{prefect.__version__}, server {version} at {url}")


def show(found: list[Finding], as_json: bool) -> None:
    """Print the page."""
    if as_json:
        print(json.dumps([vars(each) for each in found], indent=1))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for each in found:
        color = _COLORS[each.status]
        told = escape(each.message) + (f"\n[bold]{escape(each.remedy)}[/bold]" if each.remedy else "")
        table.add_row(f"[{color}]{each.status}[/{color}]", escape(each.name), told)
    Console(highlight=False).print(table)
