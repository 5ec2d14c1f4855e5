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

from infra.errors import PreemptedError, UserError
from pretrain import schedules
from pretrain.checkpoint import state_files
from pretrain.checkpoint.manager import CheckpointManager, TrainState
from pretrain.checkpoint.teacher_export import TeacherExporter
from pretrain.config import TrainingSettings
from pretrain.data import sample_order
from pretrain.data.loader import BAD_SAMPLE_REASONS, Batch, RankBatchSampler, batches
from pretrain.distributed import (
    all_gather_object,
    all_reduce_mean,
    all_reduce_sum,
    is_distributed,
    rank_and_world_size,
    shared_store,
)
from pretrain.monitoring import collapse, loss_guard, metrics_log
from pretrain.monitoring.metrics_log import BAD_SAMPLE_PREFIX, METRICS, PROBE_PREFIX, SKIPPED
from pretrain.monitoring.preemption import PreemptionListener
from pretrain.monitoring.reporter import Reporter, TrainJob
from pretrain.monitoring.watchdog import Watchdog
from pretrain.networks import build_for_inference
from pretrain.sharding import build, state
from pretrain.sharding.base import CLIP_GROUP, StepResult
from pretrain.train_module import TrainModule

_SKIPPED_SAMPLES = "skipped.jsonl"
_MIN_SAMPLES = 1000  # samples in which the share of unusable ones is not yet judged

_log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a training leaves behind."""

    weights: dict[str, Tensor]
    """The learner's state dict, whole, on the CPU; on the first rank alone"""
    metrics: list[dict[str, float]]
    images_per_second: float
    resumed_at: int
    bad_samples: dict[str, int]
    """Samples that were passed over, by reason."""
    train_state: TrainState
    speed: dict[str, float]
    """Of the last steps."""
    compute: dict[str, Any]
    """What it took: `devices`, of a `device`, and `flops_per_image` where it was counted."""


class Trainer:
    """One training of a learner, resumable from its last saved state."""

    def __init__(self, job: TrainJob, module: TrainModule) -> None:
        settings = job.settings
        self.job, self.module, self.settings, self.dataset = job, module, settings, job.dataset
        self.title, self.work = job.title, job.work
        self.checkpoints = CheckpointManager(job.work, job.url, settings.runtime.keep)
        self.rank, self.world_size = rank_and_world_size()
        self.micro_batch, self.accumulation = schedules.split_global_batch(settings, self.world_size)
        groups = parameter_groups(module, settings)
        spread = (self.micro_batch, self.accumulation)
        self.backend = build.build(module, groups, settings.optimizer, settings.sharding, spread)
        self.teacher_exporter = (
            TeacherExporter(job) if self.rank == 0 and settings.runtime.export_teacher_every else None
        )
        self.preemption = PreemptionListener()
        self.metrics: list[dict[str, float]] = []
        self.train_state = TrainState()
        self.stop_requested = False
        self.bad_samples: Counter[str] = Counter()
        self.watchdog: Watchdog | None = None

    def run(self) -> TrainResult:
        """Train from wherever the work directory says to the last step.

        Raises:
            PreemptedError: the process was asked to stop; its state is saved.
            UserError: losses stay bad, features collapse, or too many samples are unusable.
        """
        first, started = self._resume(), time.monotonic()
        self._drop_later_skips()
        reporter = Reporter(self.job, self.backend.device, first)
        begun = self.train_state.samples
        self.module.train()
        steps = self.settings.schedule.steps
        with reporter.report(), self.preemption.listen(), self._run_watchdog(), self._complete_saves():
            step = first
            while step < steps:
                source = batches(self.dataset, self._sampler(step), self.settings.runtime.num_workers)
                for _ in range(step, steps):
                    self._step(step, source)
                    reporter.step(self.metrics[-1])
                    step += 1
                    self._check_collapse()
                    self._export_teacher(step)
                    bad = loss_guard.count_consecutive_skips(self.metrics)
                    if bad >= self.settings.guards.max_consecutive_skips:
                        step = self._roll_back()
                        break
                    due = _is_due(step, self.settings.runtime.checkpoint_every)
                    if step < steps and ((due and not bad) or self.stop_requested):
                        self._save(step)
                    if step < steps and self.stop_requested:
                        self.checkpoints.wait()
                        raise PreemptedError(f"{self.title}: stopped after step {step}, as asked; run again to resume")
        seconds = time.monotonic() - started
        if first < steps:
            self._save(steps)
        self.checkpoints.finalize(steps)
        if self.teacher_exporter is not None:
            self.teacher_exporter.wait()
        if self.rank == 0:
            metrics_log.write_rows(self.work / METRICS, self.metrics)
        speed = (self.train_state.samples - begun) / max(seconds, 1e-9)
        bad_samples = dict(sorted(self.bad_samples.items()))
        weights, compute = state.full_state_dict(self.backend), self._compute_facts(reporter)
        return TrainResult(weights, self.metrics, speed, first, bad_samples, self.train_state, reporter.speed, compute)

    def _compute_facts(self, reporter: Reporter) -> dict[str, Any]:
        device = torch.cuda.get_device_name(self.backend.device) if self.backend.device.type == "cuda" else "CPU"
        counted = {} if reporter.flops is None else {"flops_per_image": reporter.flops}
        return {"devices": self.world_size, "device": device, **counted}

    @contextmanager
    def _run_watchdog(self) -> Iterator[None]:
        """Among several ranks, end the job where one of them hangs."""
        if is_distributed():
            self.watchdog = Watchdog(shared_store(), self.rank, self.world_size, self.settings.runtime.hang_timeout_s)
            with self.watchdog.monitor():
                yield
        else:
            yield

    @contextmanager
    def _complete_saves(self) -> Iterator[None]:
        """Whatever ends a training of one process, a state that is being written becomes whole.

        Raises:
            PreemptedError: Ctrl-C was pressed twice, and there is a state to resume from.
        """
        try:
            yield
        except BaseException as error:
            if is_distributed():  # others may never come to wait for one another
                raise
            self.checkpoints.wait()
            if isinstance(error, KeyboardInterrupt) and self.preemption.is_requested:
                raise state_files.interrupted_error(self.title, self.job.url) or error from None
            raise

    def _report_activity(self, step: int, what: str) -> None:
        if self.watchdog is not None:
            self.watchdog.report(f"step {step}: {what}")

    def _sampler(self, step: int) -> RankBatchSampler:
        steps = self.settings.schedule.steps
        return RankBatchSampler(
            self.rank, self.world_size, self.micro_batch, self.accumulation, step, steps, self.train_state.samples
        )

    def _step(self, step: int, source: Iterator[Batch]) -> None:
        """One optimizer step and its row of telemetry."""
        values = schedules.schedule_values(self.settings, step)
        self._apply_schedule(values)
        self.backend.ema_update(self.module.begin_step(step), 0.0)
        self.module.collect_metrics = _is_due(step + 1, self.settings.collapse.every)
        _seed_dropout(self.settings.schedule.seed, step, self.rank)
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        totals, facts, places, result = self._run_micro_batches(step, source, values.temperature)
        if result.applied:
            self.backend.ema_update(self.module.ema_pairs(), values.momentum)
        else:
            for buffer, before in buffers:
                buffer.copy_(before)
        losses = dict(zip(totals, all_reduce_mean(torch.stack(list(totals.values()))).tolist(), strict=True))
        losses = collapse.drop_unmeasured(losses)
        self.train_state = replace(
            self.train_state, samples=self.train_state.samples + self.settings.schedule.global_batch_size
        )
        row = {"step": step, "samples": self.train_state.samples, "lr": values.lr, "momentum": values.momentum}
        row |= (
            {"gradient_norm": result.gradient_norm}
            | losses
            | self._count_bad_samples(facts[:-2])
            | self._run_probe(step + 1)
        )
        self.metrics.append(row if result.applied else self._record_skip(row, places))
        self.stop_requested = facts[-1] > 0
        if facts[-2] == self.world_size:
            self.checkpoints.commit()

    def _run_probe(self, steps: int) -> dict[str, float]:
        """What the caller's probe says of the released backbone, if it is due."""
        settings = self.settings.collapse.probe
        if self.job.probe is None or settings is None or not _is_due(steps, settings.every):
            return {}
        self._report_activity(steps, "probing")
        part = self.module.branches()[0]
        weights = state.full_state_dict(self.backend, f"{part.prefix}{part.released}.")
        if self.rank != 0:
            return {}
        backbone = build_for_inference(weights, part.student.config)
        try:
            return {PROBE_PREFIX + key: value for key, value in self.job.probe(backbone, steps).items()}
        except Exception:  # somebody else's code: no reason to end a training
            _log.warning("%s: the probe failed after step %d", self.title, steps, exc_info=True)
            return {}

    def _check_collapse(self) -> None:
        """Warn of collapse, and stop where that is asked for."""
        row, settings = self.metrics[-1], self.settings.collapse
        found = "; ".join(collapse.find_alarms(row, settings))
        if not found:
            return
        if self.rank == 0:
            _log.warning("%s: step %d looks like collapse: %s", self.title, row["step"], found)
        if (
            settings.stop_after is not None
            and collapse.count_consecutive_alarms(self.metrics, settings) >= settings.stop_after
        ):
            self.checkpoints.wait()
            if self.rank == 0:
                metrics_log.write_rows(self.work / METRICS, self.metrics)
            raise UserError(
                f"{self.title}: collapsed at step {row['step']:.0f}: {found}; lower optimizer.base_lr or the teacher's "
                "temperature, or loosen collapse"
            )

    def _run_micro_batches(
        self, step: int, source: Iterator[Batch], temperature: float
    ) -> tuple[dict[str, Tensor], list[int], list[int], StepResult]:
        """Forward and backward passes of one step, and the step.

        Returns:
            Means of loss and terms over this rank's micro-batches; over all ranks, samples passed over by reason, ranks
            that have written their part of a state, ranks that were asked to stop; places of this rank's samples; what
            came of the step.
        """
        limit = loss_guard.spike_limit(self.metrics, self.settings.guards)
        totals: dict[str, Tensor] = {}
        facts = torch.zeros(len(BAD_SAMPLE_REASONS) + 2, dtype=torch.int64, device=self.backend.device)
        places: list[int] = []
        result = None
        for micro_step in range(self.accumulation):
            self._report_activity(step, "waiting for data")
            batch = next(source)
            self._report_activity(step, "forward")
            places += batch.positions.tolist()
            batch = batch.to(self.backend.device)
            loss, terms = self.backend.forward(batch, temperature)
            self._report_activity(step, "backward")
            facts[:-2] += batch.skipped_counts
            for name, value in {"loss": loss, **terms}.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / self.accumulation
            if micro_step + 1 == self.accumulation:
                loss = loss * loss_guard.nan_if_spike(all_reduce_mean(totals["loss"].clone()), limit)
            self.backend.backward(loss)
            result = self.backend.step()
        assert result is not None
        facts[-2], facts[-1] = self.checkpoints.is_written(), self.preemption.is_requested
        return totals, all_reduce_sum(facts).tolist(), places, result

    def _count_bad_samples(self, counts: list[int]) -> dict[str, float]:
        """Add up the samples that could not be used, stop where they are too many, and return what telemetry says."""
        new = {reason: count for reason, count in zip(BAD_SAMPLE_REASONS, counts, strict=True) if count}
        if new and not self.bad_samples and self.rank == 0:
            _log.warning("%s: samples are passed over (%s); metrics.jsonl counts them", self.title, ", ".join(new))
        self.bad_samples.update(new)
        ceiling = self.settings.runtime.max_bad_sample_fraction
        if self.bad_samples.total() > ceiling * max(self.train_state.samples, _MIN_SAMPLES):
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.bad_samples.items())
            self.checkpoints.wait()
            share = f"{self.bad_samples.total()} of {self.train_state.samples} samples"
            raise UserError(
                f"{self.title}: {share} cannot be used ({reasons}), more than "
                f"runtime.max_bad_sample_fraction {ceiling:g}; ingest the corpora again, or raise it"
            )
        return {BAD_SAMPLE_PREFIX + reason: float(count) for reason, count in new.items()}

    def _apply_schedule(self, values: schedules.ScheduleValues) -> None:
        for group in self.backend.parameter_groups():
            frozen = group["last_layer"] and values.last_layer_frozen
            group["lr"] = 0.0 if frozen else values.lr * group["lr_multiplier"]
            group["weight_decay"] = values.weight_decay * group["weight_decay_multiplier"]

    def _record_skip(self, row: dict[str, float], places: list[int]) -> dict[str, float]:
        """Say which samples a skipped step had; return its row without what is no number."""
        self.train_state = replace(self.train_state, skipped_steps=self.train_state.skipped_steps + 1)
        rows = self.dataset.order.rows_at(np.array(places))
        keys = all_gather_object([self.dataset.samples.key(int(each)) for each in rows])
        if self.rank == 0:
            _log.warning("%s: step %d is skipped, its loss %s", self.title, row["step"], row["loss"])
            skipped = {"step": row["step"], "samples": row["samples"], "loss": str(row["loss"]), "keys": keys}
            with (self.work / _SKIPPED_SAMPLES).open("a") as file:
                file.write(json.dumps(skipped) + "\n")
        return {name: value for name, value in row.items() if math.isfinite(value)} | {SKIPPED: 1.0}

    def _roll_back(self) -> int:
        """Go back to the last checkpoint, and on from there with samples that were not seen; return its step."""
        train_state = replace(self.train_state, rollbacks=self.train_state.rollbacks + 1)
        message = f"{self.title}: {self.settings.guards.max_consecutive_skips} steps in a row were skipped"
        if self.rank == 0:
            metrics_log.write_rows(self.work / METRICS, self.metrics)  # what is reported, should this be the end
        self.checkpoints.wait()
        if train_state.rollbacks > self.settings.guards.max_rollbacks:
            raise UserError(
                f"{message}, after {self.train_state.rollbacks} rollbacks; see metrics.jsonl and {_SKIPPED_SAMPLES} "
                f"in {self.work}, lower optimizer.base_lr, and remove {self.checkpoints.states_url} to start afresh"
            )
        step = self._resume()
        if step == 0:
            raise UserError(f"{message} before the first checkpoint; lower optimizer.base_lr or checkpoint more often")
        _log.warning("%s; back to step %d, on with other samples", message, step)
        self.train_state = train_state
        self.checkpoints.update_train_state(step, train_state)
        return step

    def _export_teacher(self, step: int) -> None:
        """Write out what would be released now, if it is due; the last one is the checkpoint itself."""
        every, steps = self.settings.runtime.export_teacher_every, self.settings.schedule.steps
        if not _is_due(step, every) or step == steps:
            return
        self._report_activity(step, "gathering its teacher")
        (part,) = self.module.branches()
        found = {name: state.full_state_dict(self.backend, part.prefix + name) for name in part.saved_prefixes}
        if self.teacher_exporter is not None:
            weights = {
                part.saved_prefixes[name] + key: value.clone()
                for name, each in found.items()
                for key, value in each.items()
            }
            self.teacher_exporter.export_async(weights, step)

    def _save(self, step: int) -> None:
        self._report_activity(step, "saving its state")
        self.checkpoints.save_async(self.backend, step, self.metrics, self.train_state)

    def _resume(self) -> int:
        """Load the last saved state, if there is one; return the next step."""
        step = self.checkpoints.latest_step()
        if step == 0:
            return 0
        self.metrics, self.train_state = self.checkpoints.load(self.backend, step)
        for reason in BAD_SAMPLE_REASONS:
            self.bad_samples[reason] = int(sum(row.get(BAD_SAMPLE_PREFIX + reason, 0) for row in self.metrics))
        self.bad_samples = +self.bad_samples
        return step

    def _drop_later_skips(self) -> None:
        """Leave out of the list of skipped samples what a killed attempt wrote after its last saved state."""
        if self.rank == 0:
            metrics_log.filter_file(
                self.work / _SKIPPED_SAMPLES, lambda row: bool(row["samples"] <= self.train_state.samples)
            )


def parameter_groups(module: TrainModule, settings: TrainingSettings) -> list[dict[str, Any]]:
    """AdamW groups of parameters that share their multipliers, in a fixed order.

    Each student's gradient is clipped by itself, so that it does not matter with which others it learns.
    """
    groups: dict[tuple[str, schedules.Multipliers], list[torch.nn.Parameter]] = {}
    for branch in module.branches():
        last_layers = {
            id(parameter)
            for objective in module.objectives_of(branch)
            for layer in objective.last_layers()
            for parameter in layer.parameters()
        }
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name.startswith(branch.prefix):
                own = name.removeprefix(branch.prefix)
                key = schedules.multipliers(
                    own, parameter.ndim, settings.optimizer, branch, id(parameter) in last_layers
                )
                clipped = branch.prefix + (_component(own) if settings.optimizer.grad_clip_scope == "parts" else "")
                groups.setdefault((clipped, key), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_multiplier": key.lr,
            "weight_decay_multiplier": key.weight_decay,
            "last_layer": key.last_layer,
            CLIP_GROUP: clipped,
        }
        for (clipped, key), parameters in groups.items()
    ]


def _is_due(steps: int, every: int) -> bool:
    return every > 0 and steps % every == 0


def _component(name: str) -> str:
    """The backbone or the objective that a parameter belongs to."""
    return ".".join(name.split(".")[: 2 if name.startswith("objectives.") else 1])


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make stochastic depth a function of the step, so that nothing about it need be saved."""
    torch.manual_seed(int(sample_order.generator(seed, sample_order.DROPOUT, step, rank).integers(2**62)))
