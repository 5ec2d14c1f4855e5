"""The training loop: schedules, steps, guards, checkpoints, telemetry. It knows no loss."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.errors import Preempted, UserError
from pretrain import guards, health, schedules, state_files, telemetry
from pretrain.config import TrainingSettings
from pretrain.data import order
from pretrain.data.loader import UNUSABLE, Batch, Place, batches
from pretrain.dumps import Dumps
from pretrain.guards import Preemption
from pretrain.learner import Learner
from pretrain.networks import inference
from pretrain.ranks import all_reduce_mean, all_reduce_sum, from_all_ranks, several_ranks, shared_store, world
from pretrain.reporting import Reporter, Task
from pretrain.saves import Saves, Tally
from pretrain.sharding import base, state
from pretrain.sharding.base import CLIPPED_WITH, Stepped
from pretrain.telemetry import METRICS, PROBE_PREFIX, SKIPPED, UNUSABLE_PREFIX
from pretrain.watch import Watch

_SKIPPED_SAMPLES = "skipped.jsonl"
_FEW = 1000  # samples in which the share of unusable ones is not yet judged

_log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a training leaves behind."""

    weights: dict[str, Tensor]
    """The learner's state dict, whole, on the CPU; on the first rank alone"""
    metrics: list[dict[str, float]]
    images_per_second: float
    resumed_at: int
    unusable: dict[str, int]
    """Samples that were passed over, by reason."""
    tally: Tally
    speed: dict[str, float]
    """Of the last steps."""
    compute: dict[str, Any]
    """What it took: `devices`, of a `device`, and `flops_per_image` where it was counted."""


class Trainer:
    """One training of a learner, resumable from its last saved state."""

    def __init__(self, task: Task, learner: Learner) -> None:
        settings = task.settings
        self.task, self.learner, self.settings, self.dataset = task, learner, settings, task.dataset
        self.title, self.work = task.title, task.work
        self.saves = Saves(task.work, task.url, settings.runtime.keep)
        self.rank, self.world_size = world()
        self.micro_batch, self.accumulation = schedules.spread(settings, self.world_size)
        groups = parameter_groups(learner, settings)
        spread = (self.micro_batch, self.accumulation)
        self.engine = base.build(learner, groups, settings.optimizer, settings.sharding, spread)
        self.dumps = Dumps(task) if self.rank == 0 and settings.runtime.export_teacher_every else None
        self.preemption = Preemption()
        self.metrics: list[dict[str, float]] = []
        self.tally = Tally()
        self.asked = False
        self.unusable: Counter[str] = Counter()
        self.watch: Watch | None = None

    def run(self) -> TrainResult:
        """Train from wherever the work directory says to the last step.

        Raises:
            Preempted: the process was asked to stop; its state is saved.
            UserError: losses stay bad, features collapse, or too many samples are unusable.
        """
        first, started = self._resume(), time.monotonic()
        self._forget_later_skips()
        reporter = Reporter(self.task, self.engine.device, first)
        begun = self.tally.samples
        self.learner.train()
        steps = self.settings.schedule.steps
        with reporter.reporting(), self.preemption.listening(), self._watched(), self._settling():
            step = first
            while step < steps:
                source = batches(self.dataset, self._place(step), self.settings.runtime.num_workers)
                for _ in range(step, steps):
                    self._step(step, source)
                    reporter.step(self.metrics[-1])
                    step += 1
                    self._look_after_health()
                    self._dump(step)
                    bad = guards.skipped_in_a_row(self.metrics)
                    if bad >= self.settings.guards.max_consecutive_skips:
                        step = self._rewind()
                        break
                    due = _due(step, self.settings.runtime.checkpoint_every)
                    if step < steps and ((due and not bad) or self.asked):
                        self._save(step)
                    if step < steps and self.asked:
                        self.saves.settle()
                        raise Preempted(f"{self.title}: stopped after step {step}, as asked; run again to go on")
        seconds = time.monotonic() - started
        if first < steps:
            self._save(steps)
        self.saves.keep(steps)
        if self.dumps is not None:
            self.dumps.settle()
        if self.rank == 0:
            telemetry.write(self.work / METRICS, self.metrics)
        speed = (self.tally.samples - begun) / max(seconds, 1e-9)
        unusable = dict(sorted(self.unusable.items()))
        weights, compute = state.weights(self.engine), self._compute(reporter)
        return TrainResult(weights, self.metrics, speed, first, unusable, self.tally, reporter.speed, compute)

    def _compute(self, reporter: Reporter) -> dict[str, Any]:
        device = torch.cuda.get_device_name(self.engine.device) if self.engine.device.type == "cuda" else "CPU"
        counted = {} if reporter.flops is None else {"flops_per_image": reporter.flops}
        return {"devices": self.world_size, "device": device, **counted}

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Among several ranks, end the job where one of them hangs."""
        if several_ranks():
            self.watch = Watch(shared_store(), self.rank, self.world_size, self.settings.runtime.hang_timeout_s)
            with self.watch.looking():
                yield
        else:
            yield

    @contextmanager
    def _settling(self) -> Iterator[None]:
        """Whatever ends a training of one process, a state that is being written becomes whole.

        Raises:
            Preempted: Ctrl-C was pressed twice, and there is a state to resume from.
        """
        try:
            yield
        except BaseException as error:
            if several_ranks():  # others may never come to wait for one another
                raise
            self.saves.settle()
            if isinstance(error, KeyboardInterrupt) and self.preemption.asked:
                raise state_files.stopped_at_once(self.title, self.task.url) or error from None
            raise

    def _arrive(self, step: int, what: str) -> None:
        if self.watch is not None:
            self.watch.arrive(f"step {step}: {what}")

    def _place(self, step: int) -> Place:
        steps = self.settings.schedule.steps
        return Place(self.rank, self.world_size, self.micro_batch, self.accumulation, step, steps, self.tally.samples)

    def _step(self, step: int, source: Iterator[Batch]) -> None:
        """One optimiser step and its row of telemetry."""
        position = schedules.at(self.settings, step)
        self._apply(position)
        self.engine.follow(self.learner.begin_step(step), 0.0)
        self.learner.looking = _due(step + 1, self.settings.collapse.every)
        _seed_dropout(self.settings.schedule.seed, step, self.rank)
        buffers = [(buffer, buffer.clone()) for buffer in self.learner.buffers()]
        totals, facts, places, stepped = self._micro_batches(step, source, position.temperature)
        if stepped.applied:
            self.engine.follow(self.learner.averages(), position.momentum)
        else:
            for buffer, before in buffers:
                buffer.copy_(before)
        losses = dict(zip(totals, all_reduce_mean(torch.stack(list(totals.values()))).tolist(), strict=True))
        losses = health.known(losses)
        self.tally = replace(self.tally, samples=self.tally.samples + self.settings.schedule.global_batch_size)
        row = {"step": step, "samples": self.tally.samples, "lr": position.lr, "momentum": position.momentum}
        row |= {"gradient_norm": stepped.gradient_norm} | losses | self._count(facts[:-2]) | self._probed(step + 1)
        self.metrics.append(row if stepped.applied else self._skip(row, places))
        self.asked = facts[-1] > 0
        if facts[-2] == self.world_size:
            self.saves.commit()

    def _probed(self, steps: int) -> dict[str, float]:
        """What the caller's probe says of the released backbone, if it is due."""
        settings = self.settings.collapse.probe
        if self.task.probe is None or settings is None or not _due(steps, settings.every):
            return {}
        self._arrive(steps, "probing")
        part = self.learner.parts()[0]
        weights = state.weights(self.engine, f"{part.prefix}{part.released}.")
        if self.rank != 0:
            return {}
        backbone = inference(weights, part.student.config)
        try:
            return {PROBE_PREFIX + key: value for key, value in self.task.probe(backbone, steps).items()}
        except Exception:  # somebody else's code: no reason to end a training
            _log.warning("%s: the probe failed after step %d", self.title, steps, exc_info=True)
            return {}

    def _look_after_health(self) -> None:
        """Warn of collapse, and stop where that is asked for."""
        row, settings = self.metrics[-1], self.settings.collapse
        found = "; ".join(health.alarms(row, settings))
        if not found:
            return
        if self.rank == 0:
            _log.warning("%s: step %d looks like collapse: %s", self.title, row["step"], found)
        if settings.stop_after is not None and health.alarming_looks(self.metrics, settings) >= settings.stop_after:
            self.saves.settle()
            if self.rank == 0:
                telemetry.write(self.work / METRICS, self.metrics)
            raise UserError(
                f"{self.title}: collapsed at step {row['step']:.0f}: {found}; lower optimizer.base_lr or the teacher's "
                "temperature, or loosen collapse"
            )

    def _micro_batches(
        self, step: int, source: Iterator[Batch], temperature: float
    ) -> tuple[dict[str, Tensor], list[int], list[int], Stepped]:
        """Forward and backward passes of one step, and the step.

        Returns:
            Means of loss and terms over this rank's micro-batches; over all ranks, samples passed over by reason, ranks
            that have written their part of a state, ranks that were asked to stop; places of this rank's samples; what
            came of the step.
        """
        highest = guards.highest_loss(self.metrics, self.settings.guards)
        totals: dict[str, Tensor] = {}
        facts = torch.zeros(len(UNUSABLE) + 2, dtype=torch.int64, device=self.engine.device)
        places: list[int] = []
        stepped = None
        for micro_step in range(self.accumulation):
            self._arrive(step, "waiting for data")
            batch = next(source)
            self._arrive(step, "forward")
            places += batch.positions.tolist()
            batch = batch.to(self.engine.device)
            loss, terms = self.engine.forward(batch, temperature)
            self._arrive(step, "backward")
            facts[:-2] += batch.passed_over
            for name, value in {"loss": loss, **terms}.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / self.accumulation
            if micro_step + 1 == self.accumulation:
                loss = loss * guards.poison(all_reduce_mean(totals["loss"].clone()), highest)
            self.engine.backward(loss)
            stepped = self.engine.step()
        assert stepped is not None
        facts[-2], facts[-1] = self.saves.written(), self.preemption.asked
        return totals, all_reduce_sum(facts).tolist(), places, stepped

    def _count(self, passed_over: list[int]) -> dict[str, float]:
        """Add up the samples that could not be used, stop where they are too many, and return what telemetry says."""
        new = {reason: count for reason, count in zip(UNUSABLE, passed_over, strict=True) if count}
        if new and not self.unusable and self.rank == 0:
            _log.warning("%s: samples are passed over (%s); metrics.jsonl counts them", self.title, ", ".join(new))
        self.unusable.update(new)
        ceiling = self.settings.runtime.max_bad_sample_fraction
        if self.unusable.total() > ceiling * max(self.tally.samples, _FEW):
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.unusable.items())
            self.saves.settle()
            share = f"{self.unusable.total()} of {self.tally.samples} samples"
            raise UserError(
                f"{self.title}: {share} cannot be used ({reasons}), more than "
                f"runtime.max_bad_sample_fraction {ceiling:g}; ingest the corpora again, or raise it"
            )
        return {UNUSABLE_PREFIX + reason: float(count) for reason, count in new.items()}

    def _apply(self, position: schedules.Position) -> None:
        for group in self.engine.parameter_groups():
            frozen = group["last_layer"] and position.last_layer_frozen
            group["lr"] = 0.0 if frozen else position.lr * group["lr_multiplier"]
            group["weight_decay"] = position.weight_decay * group["weight_decay_multiplier"]

    def _skip(self, row: dict[str, float], places: list[int]) -> dict[str, float]:
        """Say which samples a skipped step had; return its row without what is no number."""
        self.tally = replace(self.tally, skipped=self.tally.skipped + 1)
        rows = self.dataset.order.rows_at(np.array(places))
        keys = from_all_ranks([self.dataset.samples.key(int(each)) for each in rows])
        if self.rank == 0:
            _log.warning("%s: step %d is skipped, its loss %s", self.title, row["step"], row["loss"])
            skipped = {"step": row["step"], "samples": row["samples"], "loss": str(row["loss"]), "keys": keys}
            with (self.work / _SKIPPED_SAMPLES).open("a") as file:
                file.write(json.dumps(skipped) + "\n")
        return {name: value for name, value in row.items() if math.isfinite(value)} | {SKIPPED: 1.0}

    def _rewind(self) -> int:
        """Go back to the last checkpoint, and on from there with samples that were not seen; return its step."""
        now = replace(self.tally, rewinds=self.tally.rewinds + 1)
        story = f"{self.title}: {self.settings.guards.max_consecutive_skips} steps in a row were skipped"
        if self.rank == 0:
            telemetry.write(self.work / METRICS, self.metrics)  # what is reported, should this be the end
        self.saves.settle()
        if now.rewinds > self.settings.guards.max_rollbacks:
            raise UserError(
                f"{story}, after {self.tally.rewinds} times back; see metrics.jsonl and {_SKIPPED_SAMPLES} in "
                f"{self.work}, lower optimizer.base_lr, and remove {self.saves.folder} to start afresh"
            )
        step = self._resume()
        if step == 0:
            raise UserError(f"{story} before the first checkpoint; lower optimizer.base_lr or checkpoint more often")
        _log.warning("%s; back to step %d, on with other samples", story, step)
        self.tally = now
        self.saves.revise(step, now)
        return step

    def _dump(self, step: int) -> None:
        """Write out what would be released now, if it is due; the last one is the checkpoint itself."""
        every, steps = self.settings.runtime.export_teacher_every, self.settings.schedule.steps
        if not _due(step, every) or step == steps:
            return
        self._arrive(step, "gathering its teacher")
        (part,) = self.learner.parts()
        found = {name: state.weights(self.engine, part.prefix + name) for name in part.kept}
        if self.dumps is not None:
            weights = {
                part.kept[name] + key: value.clone() for name, each in found.items() for key, value in each.items()
            }
            self.dumps.begin(weights, step)

    def _save(self, step: int) -> None:
        self._arrive(step, "saving its state")
        self.saves.begin(self.engine, step, self.metrics, self.tally)

    def _resume(self) -> int:
        """Load the last saved state, if there is one; return the next step."""
        step = self.saves.newest()
        if step == 0:
            return 0
        self.metrics, self.tally = self.saves.load(self.engine, step)
        for reason in UNUSABLE:
            self.unusable[reason] = int(sum(row.get(UNUSABLE_PREFIX + reason, 0) for row in self.metrics))
        self.unusable = +self.unusable
        return step

    def _forget_later_skips(self) -> None:
        """Leave out of the list of skipped samples what a killed attempt wrote after its last saved state."""
        if self.rank == 0:
            telemetry.cut(self.work / _SKIPPED_SAMPLES, lambda row: bool(row["samples"] <= self.tally.samples))


def parameter_groups(learner: Learner, settings: TrainingSettings) -> list[dict[str, Any]]:
    """AdamW groups of parameters that share their multipliers, in a fixed order.

    Each student's gradient is clipped by itself, so that it does not matter with which others it learns.
    """
    groups: dict[tuple[str, schedules.Multipliers], list[torch.nn.Parameter]] = {}
    for part in learner.parts():
        last_layers = {
            id(parameter)
            for objective in learner.objectives_of(part)
            for layer in objective.last_layers()
            for parameter in layer.parameters()
        }
        for name, parameter in learner.named_parameters():
            if parameter.requires_grad and name.startswith(part.prefix):
                own = name.removeprefix(part.prefix)
                key = schedules.multipliers(own, parameter.ndim, settings.optimizer, part, id(parameter) in last_layers)
                clipped = part.prefix + (_kind(own) if settings.optimizer.grad_clip_scope == "parts" else "")
                groups.setdefault((clipped, key), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_multiplier": key.lr,
            "weight_decay_multiplier": key.weight_decay,
            "last_layer": key.last_layer,
            CLIPPED_WITH: clipped,
        }
        for (clipped, key), parameters in groups.items()
    ]


def _due(steps: int, every: int) -> bool:
    return every > 0 and steps % every == 0


def _kind(name: str) -> str:
    """The backbone or the objective that a parameter belongs to."""
    return ".".join(name.split(".")[: 2 if name.startswith("objectives.") else 1])


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make stochastic depth a function of the step, so that nothing about it need be saved."""
    torch.manual_seed(int(order.generator(seed, order.DROPOUT, step, rank).integers(2**62)))
