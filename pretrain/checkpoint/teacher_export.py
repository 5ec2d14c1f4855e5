"""Released backbones written out while a training goes on, each a checkpoint of its own, to be evaluated by others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from infra.artifacts.artifact import SHORT_ID, Artifact, ArtifactSpec, find, get_or_create
from infra.artifacts.staging import read_record
from infra.errors import UserError
from infra.storage.filesystem import is_folder, join, list_files
from pretrain.checkpoint import artifact
from pretrain.monitoring.reporter import TrainJob

VERSION = 2

_log = logging.getLogger(__name__)


def export_url(checkpoint: str) -> str:
    """Where the teachers of a training lie, given the URL of its checkpoint."""
    return f"{checkpoint.rstrip('/')}.teachers"


def list_exports(checkpoint: str) -> list[tuple[int, Artifact]]:
    """The teachers that the training at a URL has written so far, with their steps, in order.

    Those of an earlier training with other settings, which may lie beside them, are passed over.
    """
    training = _training_id_at(checkpoint)
    names = [name for name in _list_names(checkpoint) if training is not None and name.startswith(training[:SHORT_ID])]
    found = [find(join(export_url(checkpoint), name)) for name in names]
    steps = [(int(each.manifest.config["step"]), each) for each in found if each is not None]
    return sorted(steps, key=lambda pair: pair[0])


def _list_names(checkpoint: str) -> list[str]:
    """Of all that lies where teachers do, in order."""
    folder = export_url(checkpoint)
    return sorted({path.partition("/")[0] for path in list_files(folder)}) if is_folder(folder) else []


def _training_id_at(checkpoint: str) -> str | None:
    """Id of the training that has ended, or is going on, at a URL."""
    finished = find(checkpoint)
    if finished is not None:
        return finished.id
    before = read_record(checkpoint)
    return None if before is None else before.id


class TeacherExporter:
    """Writes teachers, one after another, beside the training; used on the first rank."""

    def __init__(self, job: TrainJob) -> None:
        self.job = job
        self._writer = ThreadPoolExecutor(1, "dumps")
        self._writing: list[Future[None]] = []

    def export_async(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Start to write what is released after some steps; nobody may change the weights any more."""
        self._writing.append(self._writer.submit(self._write, weights, step))

    def wait(self) -> None:
        """Wait until all are written."""
        for each in self._writing:
            each.result()
        self._writing = []
        self._writer.shutdown()

    def _write(self, weights: Mapping[str, Tensor], step: int) -> None:
        planned = self.job.spec
        plan = ArtifactSpec(
            "checkpoint", "teacher", VERSION, {**planned.settings, "training": planned.id, "step": step}, planned.inputs
        )

        def write(directory: Path) -> Mapping[str, Any]:
            artifact.write(weights, self.job.descriptions[0], directory)
            return {"images": self.job.dataset.samples.size, "steps": step}

        try:
            get_or_create(plan, join(export_url(self.job.url), f"{planned.id[:SHORT_ID]}-{step:08d}"), write)
        except (OSError, UserError) as error:  # no reason to end a training
            _log.warning("%s: the teacher after step %d was not written: %s", self.job.title, step, error)
