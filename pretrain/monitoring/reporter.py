"""What a training shows and records while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from infra.artifacts.artifact import ArtifactSpec
from infra.hashing import hash_json
from infra.progress import Advance, progress
from pretrain.checkpoint.artifact import CheckpointDescription
from pretrain.config import TrainingSettings
from pretrain.data.loader import ViewDataset
from pretrain.distributed import rank_and_world_size
from pretrain.models.timm_network import Network
from pretrain.monitoring import metrics_log, throughput, trackers
from pretrain.monitoring.throughput import ThroughputMeter
from pretrain.planning import dryrun, hardware
from pretrain.train_module import TrainModule

_log = logging.getLogger(__name__)
_DRY = 4  # images, at most, of the micro-batch whose work is counted

Probe = Callable[[Network, int], Mapping[str, float]]
"""Scores the released backbone after some steps: called on the first rank with its weights, for inference."""


@dataclass(frozen=True)
class TrainJob:
    """What is trained, on what, and where it goes."""

    title: str
    settings: TrainingSettings
    descriptions: Sequence[CheckpointDescription]
    """Of the learner's parts, in order."""
    dataset: ViewDataset
    build_module: Callable[[], TrainModule]
    """Makes the learner, with its initial weights."""
    work: Path
    """The local folder in which the checkpoint is made."""
    url: str
    """Where the checkpoint will be; saved states lie under it."""
    spec: ArtifactSpec
    """What decides the checkpoint's id."""
    probe: Probe | None = None
    """Called every `collapse.probe.every` steps."""

    def flops_and_peak(self, device: torch.device) -> tuple[float, float]:
        """FLOPs of an image, and the FLOP/s that the devices of all ranks can reach."""
        images = min(self.settings.runtime.micro_batch_size or self.settings.schedule.global_batch_size, _DRY)
        batch = self.dataset.batch(np.arange(images))
        flops = dryrun.count_batch_flops(dryrun.build_on_meta(self.build_module), self.settings, batch) / images
        return flops, rank_and_world_size()[1] * hardware.peak_flops(device, self.settings.sharding.precision)


def _run_name(job: TrainJob) -> str:
    """A name for trackers: of this place alone, and the same when the training goes on."""
    return f"{job.work.name}-{hash_json(job.url)[:8]}"


class Reporter:
    """Progress bar, trackers and speed, on the first rank; on others nothing.

    Attributes:
        speed: of the last steps, as `Meter.update` gives it.
    """

    def __init__(self, job: TrainJob, device: torch.device, first_step: int) -> None:
        self.job, self.first_step, self.shown = job, first_step, rank_and_world_size()[0] == 0
        self.speed: dict[str, float] = {}
        self._meter = ThroughputMeter(
            job.settings.schedule.global_batch_size, device, lambda: job.flops_and_peak(device)
        )
        self._trackers: list[trackers.Tracker] = []
        self._advance: Advance | None = None
        self._steps_done = first_step

    @property
    def flops(self) -> float | None:
        """FLOPs of an image, if they are known by now."""
        return self._meter.flops

    @contextmanager
    def report(self) -> Iterator[None]:
        if not self.shown:
            yield
            return
        settings, task = self.job.settings, self.job
        folder = settings.launch.job_folder(task.work)
        self._trackers = trackers.build(settings.runtime.trackers, folder, _run_name(task), self.first_step)
        try:
            with progress(task.title, settings.schedule.steps, self.first_step) as self._advance:
                yield
        finally:
            for each in list(self._trackers):
                self._use_or_drop(each, lambda tracker: tracker.close())

    def step(self, row: Mapping[str, float]) -> None:
        """Report a step by its row of telemetry."""
        if self._advance is None:
            return
        self.speed = self._meter.update()
        values = {name: value for name, value in row.items() if name != "step"}
        for tracker in list(self._trackers):
            self._use_or_drop(tracker, lambda each: each.log(int(row["step"]), values | self.speed))
        made = int(row["step"]) + 1
        self._advance(
            made - self._steps_done, note=throughput.describe_step(metrics_log.select_losses(row), self.speed)
        )
        self._steps_done = made  # less than before, after a rewind

    def _use_or_drop(self, tracker: trackers.Tracker, use: Callable[[trackers.Tracker], None]) -> None:
        """Use a tracker; one that fails is given up: no server's trouble may end a training."""
        try:
            use(tracker)
        except Exception as error:
            self._trackers.remove(tracker)
            _log.warning("%s: %s gets no more telemetry: %s", self.job.title, type(tracker).__name__, error)
