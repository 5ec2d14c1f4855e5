"""Prefect's settings, made before it is imported."""

from __future__ import annotations

import os
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


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
