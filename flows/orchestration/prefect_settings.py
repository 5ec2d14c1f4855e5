"""Prefect's settings, made before it is imported."""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path

_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
}


def set_up_prefect() -> None:
    """Set defaults: Prefect must neither call home nor print tracebacks of mistakes that are one line here.

    Its database lies in the home folder, or in `$FOVEA_CACHE` where nothing can be written there.

    Raises:
        UserError: nothing can be written in either.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "PREFECT_HOME" not in os.environ and not _is_writable(Path.home() / ".prefect"):
        from infra.artifacts.artifact import cache_directory

        os.environ["PREFECT_HOME"] = str(cache_directory() / "prefect")
    _repair_forked_processes()


@cache
def _repair_forked_processes() -> None:
    """Let forked processes, such as the loader's workers, end with exit code 0 after Prefect ran in their parent.

    Prefect 3.8 resets its services in a child but keeps their calls at exit, which fail there. The child then ends
    with exit code 1, and the loader reports a worker that "exited unexpectedly".
    """
    os.register_at_fork(after_in_child=_drop_exit_calls)


def _drop_exit_calls() -> None:
    calls = threading._threading_atexits  # type: ignore[attr-defined]
    calls[:] = [call for call in calls if not (call.func.__module__ or "").startswith("prefect.")]


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
