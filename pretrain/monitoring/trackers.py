"""Where a training's telemetry goes while it runs: a file of JSON lines always, experiment trackers if asked for."""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from infra.errors import UserError
from pretrain.config import TrackerName
from pretrain.monitoring import metrics_log
from pretrain.monitoring.prometheus import PrometheusTracker

LIVE_METRICS = "live_metrics.jsonl"
_MODULES: dict[TrackerName, str] = {"prometheus": "prometheus_client"}


class Tracker(Protocol):
    """Takes the numbers of each step."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def build(names: Sequence[TrackerName], folder: Path, run: str, first_step: int) -> list[Tracker]:
    """The trackers of a run.

    Args:
        folder: the job's, for what they write on this machine.
        run: what the run is called, the same when it goes on.
        first_step: where it begins now, or goes on.

    Raises:
        UserError: a tracker's package is missing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = _JsonLines(folder, first_step)
    except OSError as error:
        raise UserError(f"launch.job_dir: {folder}: {error.strerror}; choose another") from None
    makers: dict[TrackerName, Callable[[Path, str, int], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _Wandb,
        "mlflow": _MLflow,
        "prometheus": lambda _, run, __: PrometheusTracker(_package("prometheus"), run),
    }
    return [lines, *(makers[name](folder, run, first_step) for name in names)]


def _package(name: TrackerName) -> Any:
    try:
        return importlib.import_module(_MODULES.get(name, name))
    except ImportError:
        raise UserError(f"runtime.trackers: {name} is not installed; pip install 'fovea[trackers]'") from None


class _JsonLines:
    def __init__(self, folder: Path, first_step: int) -> None:
        path = folder / LIVE_METRICS
        metrics_log.filter_file(path, lambda row: bool(row["step"] < first_step))
        self._file = path.open("a", buffering=1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step} | dict(values)) + "\n")

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: Path, run: str, first_step: int) -> None:
        _package("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # What a killed attempt wrote after its last saved state is hidden.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Project, mode and key come from W&B's own environment variables."""

    def __init__(self, folder: Path, run: str, first_step: int) -> None:
        self._run = _package("wandb").init(dir=str(folder), id=run, name=run, resume="allow")
        self._run.define_metric("*", step_metric="step")  # its own count never goes back, a rewound training does

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step} | dict(values))

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """The server comes from MLFLOW_TRACKING_URI; without one, a database in the job's folder."""

    def __init__(self, folder: Path, run: str, first_step: int) -> None:
        mlflow = _package("mlflow")
        from mlflow.tracking import MlflowClient

        default = f"sqlite:///{(folder / 'mlflow.db').absolute()}"
        self._client = MlflowClient(mlflow.get_tracking_uri() if mlflow.tracking.is_tracking_uri_set() else default)
        known = folder / "mlflow.run"
        if not known.exists():
            known.write_text(self._client.create_run(self._experiment(), run_name=run).info.run_id)
        self._id = known.read_text()

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)
