"""The training loop: schedules, steps, guards, checkpoints, telemetry. It knows no loss."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra import storage
from infra.artifacts import flush
from infra.errors import Preempted, UserError
from infra.progress import progress
from pretrain import guards, schedules, telemetry
from pretrain.config import PretrainSettings
from pretrain.data import order
from pretrain.data.loader import UNUSABLE, Batch, Place, ViewDataset, batches
from pretrain.guards import Preemption
from pretrain.learner import Learner
from pretrain.ranks import all_reduce_mean, all_reduce_sum, barrier, several_ranks, shared_store, world
from pretrain.sharding import base, state
from pretrain.sharding.base import CLIPPED_WITH, Stepped
from pretrain.telemetry import METRICS, SKIPPED, UNUSABLE_PREFIX
from pretrain.watch import Watch

TRAINING = "training"  # the last state, from which training can go on
_STEPS = "steps"
_PLACE = "place.json"
_FEW = 1000  # samples in which the share of unusable ones is not yet judged

_log = logging.getLogger(__name__)


@dataclass
class Trained:
    """What a training leaves behind."""

    weights: dict[str, Tensor]
    """The learner's state dict, whole, on the CPU; on the first rank alone"""
    metrics: list[dict[str, float]]
    images_per_second: float
    resumed_at: int
    unusable: dict[str, int]
    """Samples that were passed over, by reason."""
    skipped: int
    """Steps that were skipped."""
    rewinds: int
    """Times it went back to a checkpoint."""


class Training:
    """One training of a learner, resumable from the last checkpoint in its work directory."""

    def __init__(
        self, title: str, learner: Learner, dataset: ViewDataset, settings: PretrainSettings, work: Path
    ) -> None:
        self.title, self.learner, self.settings, self.work = title, learner, settings, work
        self.dataset = dataset
        self.rank, self.world_size = world()
        self.micro_batch, self.accumulation = schedules.spread(settings, self.world_size)
        groups = parameter_groups(learner, settings)
        spread = (self.micro_batch, self.accumulation)
        self.engine = base.build(learner, groups, settings.optimizer, settings.sharding, spread)
        self.preemption = Preemption()
        self.metrics: list[dict[str, float]] = []
        self.seen = self.rewinds = self.skipped = 0
        self.asked = False
        self.unusable: Counter[str] = Counter()
        self.watch: Watch | None = None

    def run(self) -> Trained:
        """Train from wherever the work directory says to the last step.

        Raises:
            Preempted: the process was asked to stop; its state is saved.
            UserError: losses stay bad, or too many samples are unusable.
        """
        first, started = self._resume(), time.monotonic()
        begun = self.seen
        self.learner.train()
        steps = self.settings.schedule.steps
        shown = self.rank == 0
        with progress(self.title, steps, first, shown) as advance, self.preemption.listening(), self._watched():
            step = first
            while step < steps:
                source = batches(self.dataset, self._place(step), self.settings.runtime.workers)
                for _ in range(step, steps):
                    advance(note=f"loss {self._step(step, source):.3f}")
                    step += 1
                    bad = guards.skipped_in_a_row(self.metrics)
                    if bad >= self.settings.guards.max_skips:
                        step = self._rewind()
                        break
                    due = step % self.settings.runtime.checkpoint_every == 0
                    if step < steps and ((due and not bad) or self.asked):
                        self._checkpoint(step)
                    if step < steps and self.asked:
                        raise Preempted(f"{self.title}: stopped after step {step}, as asked; run again to go on")
        seconds = time.monotonic() - started
        self._finish()
        speed = (self.seen - begun) / max(seconds, 1e-9)
        unusable = dict(sorted(self.unusable.items()))
        whole = state.weights(self.engine)
        return Trained(whole, self.metrics, speed, first, unusable, self.skipped, self.rewinds)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Among several ranks, end the job where one of them hangs."""
        if several_ranks():
            self.watch = Watch(shared_store(), self.rank, self.world_size, self.settings.runtime.stall_seconds)
            with self.watch.looking():
                yield
        else:
            yield

    def _arrive(self, step: int, what: str) -> None:
        if self.watch is not None:
            self.watch.arrive(f"step {step}: {what}")

    def _place(self, step: int) -> Place:
        steps = self.settings.schedule.steps
        return Place(self.rank, self.world_size, self.micro_batch, self.accumulation, step, steps, self.seen)

    def _step(self, step: int, source: Iterator[Batch]) -> float:
        """One optimiser step; returns its loss."""
        position = schedules.at(self.settings, step)
        self._apply(position)
        self.engine.follow(self.learner.begin_step(step), 0.0)
        _seed_dropout(self.settings.schedule.seed, step, self.rank)
        centers = [(buffer, buffer.clone()) for buffer in self.learner.objectives.buffers()]
        totals, facts, places, stepped = self._micro_batches(step, source, position.temperature)
        if stepped.applied:
            self.engine.follow(self.learner.averages(), position.momentum)
        else:
            for buffer, before in centers:
                buffer.copy_(before)
        losses = dict(zip(totals, all_reduce_mean(torch.stack(list(totals.values()))).tolist(), strict=True))
        self.seen += self.settings.schedule.batch
        row = {"step": step, "samples": self.seen, "lr": position.lr, "momentum": position.momentum}
        row |= {"gradient_norm": stepped.gradient_norm} | losses | self._count(facts[:-1])
        self.metrics.append(row if stepped.applied else self._skip(row, places))
        self.asked = facts[-1] > 0
        return losses["loss"]

    def _micro_batches(
        self, step: int, source: Iterator[Batch], temperature: float
    ) -> tuple[dict[str, Tensor], list[int], list[int], Stepped]:
        """Forward and backward passes of one step, and the step.

        Returns:
            Means of loss and terms over this rank's micro-batches; over all ranks, samples passed over by reason and
            whether to stop; places of this rank's samples; what came of the step.
        """
        highest = guards.highest_loss(self.metrics, self.settings.guards)
        totals: dict[str, Tensor] = {}
        facts = torch.zeros(len(UNUSABLE) + 1, dtype=torch.int64, device=self.engine.device)
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
            facts[:-1] += batch.passed_over
            for name, value in {"loss": loss, **terms}.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / self.accumulation
            if micro_step + 1 == self.accumulation:
                loss = loss * guards.poison(all_reduce_mean(totals["loss"].clone()), highest)
            self.engine.backward(loss)
            stepped = self.engine.step()
        assert stepped is not None
        facts[-1] = self.preemption.asked
        return totals, all_reduce_sum(facts).tolist(), places, stepped

    def _count(self, passed_over: list[int]) -> dict[str, float]:
        """Add up the samples that could not be used, stop where they are too many, and return what telemetry says."""
        new = {reason: count for reason, count in zip(UNUSABLE, passed_over, strict=True) if count}
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

    def _skip(self, row: dict[str, float], places: list[int]) -> dict[str, float]:
        """Say which samples a skipped step had on this rank; return its row without what is no number."""
        self.skipped += 1
        rows = self.dataset.order.rows_at(torch.tensor(places).numpy())
        keys = [self.dataset.samples.key(int(each)) for each in rows]
        _log.warning("%s: step %d is skipped, its loss %s", self.title, row["step"], row["loss"])
        with (self.work / f"skipped-{self.rank:05d}.jsonl").open("a") as file:
            file.write(json.dumps({"step": row["step"], "loss": str(row["loss"]), "keys": keys}) + "\n")
        return {name: value for name, value in row.items() if math.isfinite(value)} | {SKIPPED: 1.0}

    def _rewind(self) -> int:
        """Go back to the last checkpoint, and on from there with samples that were not seen; return its step."""
        seen, rewinds, skipped = self.seen, self.rewinds + 1, self.skipped
        story = f"{self.title}: {self.settings.guards.max_skips} steps in a row were skipped"
        if self.rank == 0:
            telemetry.write(self.work / METRICS, self.metrics)  # what is reported, should this be the end
        if rewinds > self.settings.guards.max_rewinds:
            raise UserError(
                f"{story}, after {self.rewinds} times back; see metrics.jsonl and skipped-*.jsonl in "
                f"{self.work}, lower optimizer.base_lr, and remove {self.work / _STEPS} to start afresh"
            )
        step = self._resume()
        if step == 0:
            raise UserError(f"{story} before the first checkpoint; lower optimizer.base_lr or checkpoint more often")
        _log.warning("%s; back to step %d, on with other samples", story, step)
        self.seen, self.rewinds, self.skipped = seen, rewinds, skipped
        if self.rank == 0:
            self._write_place(self.work / _STEPS / str(step))
        barrier()
        return step

    def _checkpoint(self, step: int) -> None:
        """Write all state under a temporary name, then rename: a checkpoint is whole or absent."""
        folder = self.work / _STEPS / str(step)
        partial = folder.with_name(f"{step}.part")
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        self._arrive(step, "writing a checkpoint")
        state.save(self.engine, partial)
        barrier()
        if self.rank == 0:
            telemetry.write(partial / METRICS, self.metrics)
            self._write_place(partial)
            for path in partial.iterdir():
                flush(path)
            if folder.exists():  # of an attempt that was rewound
                folder.rename(folder.with_name(f"{step}.old"))
            partial.rename(folder)
            flush(folder.parent)
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other)
        barrier()

    def _write_place(self, folder: Path) -> None:
        place = {"samples": self.seen, "rewinds": self.rewinds, "skipped": self.skipped}
        storage.write_atomic(str(folder / _PLACE), json.dumps(place).encode())

    def _resume(self) -> int:
        """Load the last checkpoint, if there is one; return the next step."""
        folders = (self.work / _STEPS).glob("*")
        steps = {
            int(found.stem): found
            for found in sorted(folders, reverse=True)
            if found.name.removesuffix(".old").isdigit()
        }
        if (self.work / TRAINING).exists():
            steps = {self.settings.schedule.steps: self.work / TRAINING}
        if not steps:
            return 0
        folder = steps[max(steps)]
        state.load(self.engine, folder)
        self.metrics = telemetry.parse((folder / METRICS).read_text())
        place = json.loads((folder / _PLACE).read_text())
        self.seen, self.rewinds, self.skipped = place["samples"], place["rewinds"], place["skipped"]
        for reason in UNUSABLE:
            self.unusable[reason] = int(sum(row.get(UNUSABLE_PREFIX + reason, 0) for row in self.metrics))
        self.unusable = +self.unusable
        return max(steps)

    def _finish(self) -> None:
        """Keep the last state as `training`: by renames, so that a kill at any moment loses nothing."""
        steps = self.settings.schedule.steps
        if not (self.work / TRAINING).exists() and not (self.work / _STEPS / str(steps)).exists():
            self._checkpoint(steps)
        barrier()
        if self.rank == 0:
            if not (self.work / TRAINING).exists():
                (self.work / _STEPS / str(steps)).rename(self.work / TRAINING)
            shutil.rmtree(self.work / _STEPS, ignore_errors=True)
            telemetry.write(self.work / METRICS, self.metrics)
        barrier()


def parameter_groups(learner: Learner, settings: PretrainSettings) -> list[dict[str, Any]]:
    """AdamW groups of parameters that share their multipliers, in a fixed order."""
    last_layers = {
        id(parameter)
        for objective in learner.losses()
        for layer in objective.last_layers()
        for parameter in layer.parameters()
    }
    groups: dict[tuple[str, schedules.Multipliers], list[torch.nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            key = schedules.multipliers(
                name, parameter.ndim, settings.optimizer, settings.model, id(parameter) in last_layers
            )
            part = _part(name) if settings.optimizer.clip_of == "parts" else ""
            groups.setdefault((part, key), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_multiplier": key.lr,
            "weight_decay_multiplier": key.weight_decay,
            "last_layer": key.last_layer,
            CLIPPED_WITH: part,
        }
        for (part, key), parameters in groups.items()
    ]


def _part(name: str) -> str:
    """The backbone or the objective that a parameter belongs to."""
    return ".".join(name.split(".")[: 2 if name.startswith("objectives.") else 1])


def _seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make stochastic depth a function of the step, so that nothing about it need be saved."""
    torch.manual_seed(int(order.generator(seed, order.DROPOUT, step, rank).integers(2**62)))
