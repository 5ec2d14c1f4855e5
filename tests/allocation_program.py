"""Prints the most bytes that torch's allocator had given out in this rank, from building to the second step.

Arguments: a file of settings, the micro-batch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pretrain.config import PretrainSettings
from pretrain.data.loader import Batch
from pretrain.distributed import rank_and_world_size
from pretrain.models.execution import Execution
from pretrain.planning.dryrun import make_batch
from pretrain.sharding.base import Backend
from pretrain.sharding.build import build as build_backend
from pretrain.train import build_module
from pretrain.trainer import parameter_groups


def fullest(parts: list[Callable[[], object]]) -> int:
    """Peak of what is allocated and not yet freed, of some things done one after another."""
    held = peak = 0
    for part in parts:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            part()
        found = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(found, key=lambda each: each.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main(settings: PretrainSettings, images: int) -> int:
    torch.set_num_threads(1)
    batch = Batch(**{name: torch.zeros_like(value) for name, value in vars(make_batch(settings, images)).items()})
    made: dict[str, object] = {}

    def build() -> None:
        learner = build_module(settings).train()
        learner.precision = settings.sharding.precision
        learner.student.execution = Execution(settings.runtime.activation_checkpointing)
        groups = parameter_groups(learner, settings)
        made["engine"] = build_backend(learner, groups, settings.optimizer, settings.sharding, (images, 1))
        learner.begin_step(0)

    def step() -> None:
        engine = made["engine"]
        assert isinstance(engine, Backend)
        loss, _ = engine.forward(batch, 0.05)
        engine.backward(loss)
        del loss
        for group in engine.parameter_groups():
            group["lr"] = 1e-6
        engine.step()

    return fullest([build, step, step])


if __name__ == "__main__":
    peak = main(PretrainSettings.model_validate(json.loads(Path(sys.argv[1]).read_text())), int(sys.argv[2]))
    if rank_and_world_size()[0] == 0:
        print(peak)
