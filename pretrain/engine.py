"""The training loop: schedules, steps, checkpoints, telemetry. It knows no loss."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import UserError
from infra.progress import progress
from pretrain import schedules, sharding, telemetry
from pretrain.config import PretrainSettings
from pretrain.data import order
from pretrain.data.loader import UNUSABLE, Batch, Place, ViewDataset, batches
from pretrain.learner import Learner
from pretrain.ranks import all_reduce_sum
from pretrain.telemetry import METRICS, UNUSABLE_PREFIX

TRAINING = "training"  # the last state of engine and optimiser, from which training can go on
_STEPS = "steps"
_FEW = 1000  # samples in which the share of unusable ones is not yet judged

_log = logging.getLogger(__name__)


@dataclass
class Trained:
    """What a training leaves behind, besides the learner itself."""

    metrics: list[dict[str, float]]
    images_per_second: float
    resumed_at: int
    unusable: dict[str, int]
    """Samples that were passed over, by reason."""


class Training:
    """One training of a learner, resumable from the last checkpoint in its work directory."""

    def __init__(
        self, title: str, learner: Learner, dataset: ViewDataset, settings: PretrainSettings, work: Path
    ) -> None:
        self.title, self.learner, self.settings, self.work = title, learner, settings, work
        self.dataset = dataset
        self.rank, self.world_size = sharding.world()
        self.global_batch = schedules.global_batch(settings.schedule, self.world_size)
        groups = parameter_groups(learner, settings)
        self.engine = sharding.build(learner, groups, settings.optimizer, settings.schedule, settings.sharding)
        self.metrics: list[dict[str, float]] = []
        self.seen = 0
        self.unusable: Counter[str] = Counter()

    def run(self) -> Trained:
        """Train from wherever the work directory says to the last step."""
        first = self._resume()
        steps, accumulation = self.settings.schedule.steps, self.settings.schedule.accumulation
        micro_batch = self.settings.schedule.micro_batch
        place = Place(self.rank, self.world_size, micro_batch, accumulation, first, steps, self.seen)
        source = batches(self.dataset, place, self.settings.runtime.workers)
        started = time.monotonic()
        self.learner.train()
        with progress(self.title, steps, done=first) as advance:
            for step in range(first, steps):
                losses = self._step(step, source)
                advance(note=f"loss {losses['loss']:.3f}")
                if (step + 1) % self.settings.runtime.checkpoint_every == 0 and step + 1 < steps:
                    self._checkpoint(step + 1)
        seconds = time.monotonic() - started
        self._finish()
        speed = (steps - first) * self.global_batch / max(seconds, 1e-9)
        return Trained(self.metrics, speed, first, dict(sorted(self.unusable.items())))

    def _step(self, step: int, source: Iterator[Batch]) -> dict[str, float]:
        position = schedules.at(self.settings, step, self.global_batch)
        self._apply(position)
        self.learner.begin_step(step)
        _seed_dropout(self.settings.schedule.seed, step, self.rank)
        totals: dict[str, Tensor] = {}
        passed_over = torch.zeros(len(UNUSABLE), dtype=torch.int64, device=self.engine.device)
        accumulation = self.settings.schedule.accumulation
        for _ in range(accumulation):
            batch = next(source).to(self.engine.device)
            loss, terms = self.engine.forward(batch, position.temperature)
            self.engine.backward(loss)
            self.engine.step()
            passed_over += batch.passed_over
            for name, value in {"loss": loss.detach(), **terms}.items():
                totals[name] = totals.get(name, 0) + value / accumulation
        self.learner.update_averages(position.momentum)
        losses = sharding.average(totals)
        if not math.isfinite(losses["loss"]):
            raise UserError(f"{self.title}: the loss is {losses['loss']} at step {step}; lower optimizer.base_lr")
        self.seen += self.global_batch
        counts = self._count(passed_over)
        facts = {"step": step, "samples": self.seen, "lr": position.lr, "momentum": position.momentum}
        self.metrics.append({**facts, **losses, **counts})
        return losses

    def _count(self, passed_over: Tensor) -> dict[str, float]:
        """Add up the samples that could not be used, stop where they are too many, and return what telemetry says."""
        counts = dict(zip(UNUSABLE, all_reduce_sum(passed_over).tolist(), strict=True))
        new = {reason: count for reason, count in counts.items() if count}
        if new and not self.unusable and self.rank == 0:
            _log.warning("%s: samples are passed over (%s); metrics.jsonl counts them", self.title, ", ".join(new))
        self.unusable.update(new)
        ceiling = self.settings.runtime.max_unusable
        if self.unusable.total() > ceiling * max(self.seen, _FEW):
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.unusable.items())
            raise UserError(
                f"{self.title}: {self.unusable.total()} of {self.seen} samples cannot be used ({reasons}), more than "
                f"runtime.max_unusable {ceiling:g}; ingest the corpora again, or raise it"
            )
        return {UNUSABLE_PREFIX + reason: float(count) for reason, count in new.items()}

    def _apply(self, position: schedules.Position) -> None:
        for group in self.engine.parameter_groups():
            frozen = group["last_layer"] and position.last_layer_frozen
            group["lr"] = 0.0 if frozen else position.lr * group["lr_multiplier"]
            group["weight_decay"] = position.weight_decay * group["weight_decay_multiplier"]

    def _checkpoint(self, step: int) -> None:
        """Write all state under a temporary name, then rename: a checkpoint is whole or absent."""
        folder = self.work / _STEPS / str(step)
        partial = folder.with_name(f"{step}.part")
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        sharding.barrier()
        self.engine.save(partial)
        sharding.barrier()
        if self.rank == 0:
            telemetry.write(partial / METRICS, self.metrics)
            partial.rename(folder)
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other)
        sharding.barrier()

    def _resume(self) -> int:
        """Load the last checkpoint, if there is one; return the next step."""
        steps = {int(found.name): found for found in (self.work / _STEPS).glob("*") if found.name.isdigit()}
        if (self.work / TRAINING).exists():
            steps = {self.settings.schedule.steps: self.work / TRAINING}
        if not steps:
            return 0
        folder = steps[max(steps)]
        self.engine.load(folder)
        self.metrics = telemetry.parse((folder / METRICS).read_text())
        self.seen = int(self.metrics[-1]["samples"])
        for reason in UNUSABLE:
            self.unusable[reason] = int(sum(row.get(UNUSABLE_PREFIX + reason, 0) for row in self.metrics))
        self.unusable = +self.unusable
        return max(steps)

    def _finish(self) -> None:
        """Keep the last state as `training`: by renames, so that a kill at any moment loses nothing."""
        steps = self.settings.schedule.steps
        if not (self.work / TRAINING).exists():
            self._checkpoint(steps)
        sharding.barrier()
        if self.rank == 0:
            if not (self.work / TRAINING).exists():
                (self.work / _STEPS / str(steps)).rename(self.work / TRAINING)
            shutil.rmtree(self.work / _STEPS, ignore_errors=True)
            telemetry.write(self.work / METRICS, self.metrics)
        sharding.barrier()


def parameter_groups(learner: Learner, settings: PretrainSettings) -> list[dict[str, Any]]:
    """AdamW groups of parameters that share their multipliers, in a fixed order."""
    last_layers = {
        id(parameter)
        for objective in learner.losses()
        for layer in objective.last_layers()
        for parameter in layer.parameters()
    }
    groups: dict[schedules.Multipliers, list[torch.nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            key = schedules.multipliers(
                name, parameter.ndim, settings.optimizer, settings.model, id(parameter) in last_layers
            )
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_multiplier": key.lr,
            "weight_decay_multiplier": key.weight_decay,
            "last_layer": key.last_layer,
        }
        for key, parameters in groups.items()
    ]


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make stochastic depth a function of the step, so that nothing about it need be saved."""
    torch.manual_seed(int(order.generator(seed, order.DROPOUT, step, rank).integers(2**62)))
