"""Prefect's server of one run, out of the reach of the terminal's Ctrl-C."""

from __future__ import annotations

import signal

from flows.orchestration.prefect_settings import set_up_prefect


def start_ephemeral_server() -> None:
    """Set Prefect up and start the server that a run without `PREFECT_API_URL` uses, unless it runs already; it ends
    with this process.

    A terminal sends Ctrl-C to all processes of the run. The server must outlive it, or the run could not report its
    last state and would retry for minutes. A child process inherits the mask of blocked signals.

    Raises:
        UserError: Prefect's database can be written nowhere.
    """
    set_up_prefect()
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        SubprocessASGIServer().start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
