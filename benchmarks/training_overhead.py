"""What surrounds a training step: the moving average, checkpoints, and sharding, as shares of the step itself.

DINO and iBOT on ViT-S/16, 4 images of 2 x 224 and 8 x 96 pixels, heads of 8,192 prototypes; one process on this
machine's cores. The peer of a sharded step is the plain one, of a checkpoint torch.save of the same state.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.pretrain_step import SETTINGS, batch_of_noise
from benchmarks.report import Row, compared, main
from pretrain.config import Sharding
from pretrain.schedules import schedule_values
from pretrain.sharding import build, state
from pretrain.train import build_module
from pretrain.trainer import parameter_groups

STEPS = 4


def _seconds(run: Callable[[], object], repeats: int = STEPS) -> float:
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return statistics.median(times[1:])


def _measured(stage: int | None) -> dict[str, float]:
    """CPU-seconds of a step's parts under plain torch (None) or a ZeRO stage; checkpoints in seconds and MB."""
    torch.set_num_threads(1)
    sharding = Sharding(backend="torch") if stage is None else Sharding(zero_stage=stage)
    learner, batch = build_module(SETTINGS).train(), batch_of_noise()
    groups = parameter_groups(learner, SETTINGS)
    engine = build.build(learner, groups, SETTINGS.optimizer, sharding, (len(batch.positions), 1))
    for group in engine.parameter_groups():
        group["lr"] = schedule_values(SETTINGS, SETTINGS.optimizer.warmup_steps).lr
    learner.begin_step(0)

    def step() -> None:
        loss, _ = engine.forward(batch, 0.05)
        engine.backward(loss)
        engine.step()

    found = {"step": _seconds(step), "average": _seconds(lambda: engine.ema_update(learner.ema_pairs(), 0.99))}
    with tempfile.TemporaryDirectory() as folder:
        found["save"] = _seconds(lambda: state.write(state.collect(engine), Path(folder)), 2)
        found["copy"] = _seconds(lambda: state.collect(engine), 2)
        found["load"] = _seconds(lambda: state.load(engine, Path(folder)), 2)
        found["MB"] = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
        if stage is None:
            whole = {"module": learner.state_dict(), "optimizer": engine.optimizer.state_dict()}
            file = Path(folder) / "whole.pt"
            found["torch.save"] = _seconds(lambda: torch.save(whole, file), 2)
            found["torch.load"] = _seconds(lambda: torch.load(file, weights_only=True), 2)
    return found


def _apart(stage: int | None) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, stage).result()


def measure() -> list[Row]:
    plain = _apart(None)
    rows = [
        compared("moving average beside its step", plain["average"], plain["step"], "CPU s", target=33),
        compared("checkpoint: save", plain["save"], plain["torch.save"], "CPU s"),
        compared("checkpoint: the part that training waits for", plain["copy"], plain["torch.save"], "CPU s"),
        compared("checkpoint: load", plain["load"], plain["torch.load"], "CPU s"),
        Row("checkpoint: size", plain["MB"], "MB"),
    ]
    for stage in (0, 1, 2, 3):
        found = _apart(stage)
        rows.append(compared(f"step, ZeRO {stage}", found["step"], plain["step"], "CPU s"))
        rows.append(compared(f"moving average, ZeRO {stage}", found["average"], plain["average"], "CPU s"))
        rows.append(compared(f"checkpoint: save, ZeRO {stage}", found["save"], plain["save"], "CPU s"))
    return rows


if __name__ == "__main__":
    main("Around a step", measure)
