"""A training as the server shows it: what its launcher says, a line a minute, and how far it is."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from flows.orchestration.prefect_artifacts import suppress_api_errors
from infra.launch.callback import LaunchCallback
from pretrain.monitoring.trackers import LIVE_METRICS

_BAR_SECONDS, _LINE_SECONDS = 10.0, 60.0
_TAIL_BYTES = 1 << 16


def progress_callback(title: str, folder: Path, steps: int) -> LaunchCallback:
    """Who looks on at a training: within a flow one that tells the server, elsewhere one that prints."""
    try:
        logger = get_run_logger()
    except MissingContextError:
        return LaunchCallback()
    return ProgressCallback(title, folder, steps, logger)


class ProgressCallback(LaunchCallback):
    """The whole log stays in the job's folder: the server's database gets a line a minute of it.

    Args:
        folder: the job's.
        steps: of the whole training.
    """

    def __init__(
        self, title: str, folder: Path, steps: int, logger: logging.Logger | logging.LoggerAdapter[Any]
    ) -> None:
        self._title, self._progress, self._steps, self._logger = title, folder / LIVE_METRICS, steps, logger
        self._bar: UUID | None = None
        self._moved = self._wrote = time.monotonic()
        self._step = -1

    def on_message(self, message: str) -> None:
        super().on_message(message)
        self._logger.info(message)

    def on_poll(self) -> None:
        now = time.monotonic()
        if now - self._moved < _BAR_SECONDS:
            return
        self._moved = now
        with suppress_api_errors():  # a look must not end what it looks at
            row = last_row(self._progress)
            if row is None or row["step"] == self._step:
                return
            self._step = row["step"]
            self._move(100 * min((row["step"] + 1) / self._steps, 1.0))
            if now - self._wrote >= _LINE_SECONDS:
                self._wrote = now
                self._logger.info(describe_progress(self._title, row, self._steps))

    def _move(self, percent: float) -> None:
        if self._bar is None:
            made = create_progress_artifact(percent, key=f"fovea-{self._title}", description=f"{self._title}: steps")
            self._bar = made if isinstance(made, UUID) else None
        else:
            update_progress_artifact(self._bar, progress=percent)


def last_row(path: Path) -> dict[str, Any] | None:
    """The newest whole line of a training's telemetry."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        lines = file.read().split(b"\n")[:-1]  # what follows the last line break is not whole
    return dict(json.loads(lines[-1])) if lines else None


def describe_progress(title: str, row: dict[str, Any], steps: int) -> str:
    """A line about a step: how far, the loss, the speed."""
    told = [f"{title}: step {row['step'] + 1:,} of {steps:,}"]
    if "loss" in row:
        told.append(f"loss {row['loss']:.4g}")
    if "images_per_second" in row:
        told.append(f"{row['images_per_second']:,.0f} images/s")
    return ", ".join(told)
