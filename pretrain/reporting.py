"""What a training shows and records while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from infra.artifacts import ArtifactSpec
from infra.hashing import hash_json
from infra.progress import Advance, progress
from pretrain import meter, telemetry, trackers
from pretrain.checkpoints import Description
from pretrain.config import TrainingSettings
from pretrain.data.loader import ViewDataset
from pretrain.learner import Learner
from pretrain.meter import Meter
from pretrain.models.timm_network import Network
from pretrain.planning import dryrun, hardware
from pretrain.ranks import world

_log = logging.getLogger(__name__)
_DRY = 4  # images, at most, of the micro-batch whose work is counted

Probe = Callable[[Network, int], Mapping[str, float]]
"""Scores the released backbone after some steps: called on the first rank with its weights, for inference."""


@dataclass(frozen=True)
class Task:
    """What is trained, on what, and where it goes."""

    title: str
    settings: TrainingSettings
    descriptions: Sequence[Description]
    """Of the learner's parts, in order."""
    dataset: ViewDataset
    build: Callable[[], Learner]
    """Makes the learner, with its initial weights."""
    work: Path
    """The local folder in which the checkpoint is made."""
    url: str
    """Where the checkpoint will be; saved states lie under it."""
    planned: ArtifactSpec
    """What decides the checkpoint's id."""
    probe: Probe | None = None
    """Called every `collapse.probe.every` steps."""

    def work_and_peak(self, device: torch.device) -> tuple[float, float]:
        """FLOPs of an image, and the FLOP/s that the devices of all ranks can reach."""
        images = min(self.settings.runtime.micro_batch_size or self.settings.schedule.global_batch_size, _DRY)
        batch = self.dataset.batch(np.arange(images))
        flops = dryrun.flops_of(dryrun.shapes_of(self.build), self.settings, batch) / images
        return flops, world()[1] * hardware.peak(device, self.settings.sharding.precision)


def _run(task: Task) -> str:
    """A name for trackers: of this place alone, and the same when the training goes on."""
    return f"{task.work.name}-{hash_json(task.url)[:8]}"


class Reporter:
    """Progress bar, trackers and speed, on the first rank; on others nothing.

    Attributes:
        speed: of the last steps, as `Meter.step` gives it.
    """

    def __init__(self, task: Task, device: torch.device, first_step: int) -> None:
        self.task, self.first_step, self.shown = task, first_step, world()[0] == 0
        self.speed: dict[str, float] = {}
        self._meter = Meter(task.settings.schedule.global_batch_size, device, lambda: task.work_and_peak(device))
        self._trackers: list[trackers.Tracker] = []
        self._advance: Advance | None = None
        self._made = first_step

    @property
    def flops(self) -> float | None:
        """FLOPs of an image, if they are known by now."""
        return self._meter.flops

    @contextmanager
    def reporting(self) -> Iterator[None]:
        if not self.shown:
            yield
            return
        settings, task = self.task.settings, self.task
        folder = settings.launch.job_folder(task.work)
        self._trackers = trackers.build(settings.runtime.trackers, folder, _run(task), self.first_step)
        try:
            with progress(task.title, settings.schedule.steps, self.first_step) as self._advance:
                yield
        finally:
            for each in list(self._trackers):
                self._guarded(each, lambda tracker: tracker.close())

    def step(self, row: Mapping[str, float]) -> None:
        """Report a step by its row of telemetry."""
        if self._advance is None:
            return
        self.speed = self._meter.step()
        values = {name: value for name, value in row.items() if name != "step"}
        for tracker in list(self._trackers):
            self._guarded(tracker, lambda each: each.log(int(row["step"]), values | self.speed))
        made = int(row["step"]) + 1
        self._advance(made - self._made, note=meter.note(telemetry.losses(row), self.speed))
        self._made = made  # less than before, after a rewind

    def _guarded(self, tracker: trackers.Tracker, use: Callable[[trackers.Tracker], None]) -> None:
        """Use a tracker; one that fails is given up: no server's trouble may end a training."""
        try:
            use(tracker)
        except Exception as error:
            self._trackers.remove(tracker)
            _log.warning("%s: %s gets no more telemetry: %s", self.task.title, type(tracker).__name__, error)
