"""Trainings in processes of their own, started as their configuration says."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

from distill.config import DistillConfig
from infra.artifacts import Artifact, Plan, find, find_planned, open_artifact, work_directory
from infra.errors import UserError
from infra.launch import slurm
from infra.launch.config import Launch
from infra.launch.run import launch
from infra.launch.watching import Watcher
from infra.staging import check_unfinished
from pretrain.config import PretrainConfig

Room = Literal["pretrain", "distill"]
_MODULES = {"pretrain": "flows.pretraining", "distill": "distill"}


def train(room: Room, config: PretrainConfig | DistillConfig) -> Artifact | None:
    """Train in this process, or in those of the launcher that the configuration names.

    Returns:
        The checkpoint; None where a SLURM job was queued that nobody waits for.
    """
    if config.launcher == "local":
        if config.launch != Launch(folder=config.launch.folder):
            raise UserError("launch: read by launchers only; add --launcher torchrun, deepspeed or slurm")
        slurm.adopt_environment()
        trained: Artifact = importlib.import_module(_MODULES[room]).run(config)
        return trained
    url = train_apart(room, config)
    if not config.launch.slurm.wait and find(url) is None:
        print("queued; without --launch.slurm.wait=false the same command shows how it goes", file=sys.stderr)
        return None
    return open_artifact(url, "checkpoint")


def train_apart(room: Room, config: PretrainConfig | DistillConfig) -> str:
    """Train in other processes than this one; return the checkpoint's URL."""
    plan = _plan(config)
    url = plan.resolve(config.out)
    if find_planned(plan, config.out) is None:
        check_unfinished(url, plan.record(), config.restart)  # before ranks are started or a job is queued
        folder = config.launch.job_folder(work_directory(plan, config.out))
        with _slots(config.launch), _cancelled_with_the_flow(config, folder):
            launch(_MODULES[room], config, folder, config.launcher, config.launch, _watcher(room, folder, config))
    else:
        from pretrain.saves import remove_remote

        remove_remote(url)
    return url


def _slots(settings: Launch) -> AbstractContextManager[None]:
    """Slots of the concurrency limit that the settings name, waited for; a server out of reach does not end a training.

    Raises:
        UserError: there is no such limit.
    """
    if settings.limit is None:
        return nullcontext()
    from flows.limits import slots

    return slots(settings.limit, settings.ranks(_visible_gpus))


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


@contextmanager
def _cancelled_with_the_flow(config: PretrainConfig | DistillConfig, folder: Path) -> Iterator[None]:
    """End a SLURM job when the flow run that waits for it was cancelled; a worker that merely goes leaves it."""
    try:
        yield
    except BaseException:
        if config.launcher == "slurm" and _in_a_flow():
            from flows.limits import is_being_cancelled

            if is_being_cancelled() and (job := slurm.cancel(folder)) is not None:
                print(f"SLURM job {job} is cancelled with its flow run", file=sys.stderr)
        raise


def _watcher(room: Room, folder: Path, config: PretrainConfig | DistillConfig) -> Watcher:
    if not _in_a_flow():
        return Watcher()
    from flows.watching import watcher

    return watcher(room, folder, config.schedule.steps)


def _in_a_flow() -> bool:
    """Whether this process may run one: a command that is none must not take the seconds to import Prefect."""
    return "prefect" in sys.modules


def _plan(config: PretrainConfig | DistillConfig) -> Plan:
    if isinstance(config, DistillConfig):
        from distill.distill import plan as plan_of_distillation

        return plan_of_distillation(config)
    from pretrain.train import plan

    return plan(config)
