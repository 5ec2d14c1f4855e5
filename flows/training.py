"""Trainings in processes of their own, started as their configuration says."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

from distill.config import DistillConfig
from distill.train import specs as distill_specs
from infra.artifacts.artifact import Artifact, ArtifactSpec, find, find_existing, open_artifact, staging_dir
from infra.artifacts.staging import check_unfinished, require_unlocked
from infra.errors import UserError
from infra.launch import slurm
from infra.launch.callback import LaunchCallback
from infra.launch.config import Launch
from infra.launch.launcher import launch
from infra.notices import print_loading
from infra.storage import filesystem
from pretrain.checkpoint import spec as pretrain_specs
from pretrain.checkpoint.state_files import interrupted_error, remove_remote
from pretrain.config import PretrainConfig

Room = Literal["pretrain", "distill"]
_MODULES = {"pretrain": "flows.pretraining", "distill": "distill"}


def train(room: Room, config: PretrainConfig | DistillConfig) -> Artifact | None:
    """Train in this process, or in those of the launcher that the configuration names.

    Returns:
        The checkpoint; None where a SLURM job was queued that nobody waits for.
    """
    if config.launcher == "local":
        if config.launch != Launch(job_dir=config.launch.job_dir):
            raise UserError("launch: read by launchers only; add --launcher torchrun, deepspeed or slurm")
        slurm.adopt_environment()
        return _find_finished(room, config) or _train_here(room, config)
    url = train_apart(room, config)
    if not config.launch.slurm.wait and find(url) is None:
        print("queued; without --launch.slurm.wait=false the same command shows how it goes", file=sys.stderr)
        return None
    return open_artifact(url, "checkpoint")


def train_apart(room: Room, config: PretrainConfig | DistillConfig) -> str:
    """Train in other processes than this one; return the checkpoint's URL."""
    spec = checkpoint_spec(config)
    url = spec.resolve(config.out)
    if _find_finished(room, config) is None:
        folder = config.launch.job_folder(staging_dir(spec, config.out))
        with _require_resumable(room, url), _hold_gpu_slots(config.launch), _cancel_with_flow(config, folder):
            launch(
                _MODULES[room], config, folder, config.launcher, config.launch, _progress_callback(room, folder, config)
            )
    return url


def checkpoint_spec(config: PretrainConfig | DistillConfig) -> ArtifactSpec:
    """The checkpoint that a configuration asks for."""
    if isinstance(config, DistillConfig):
        return distill_specs.checkpoint_spec(config)
    return pretrain_specs.checkpoint_spec(config)


def _find_finished(room: Room, config: PretrainConfig | DistillConfig) -> Artifact | None:
    """The checkpoint, if it has been made: told before torch is imported, ranks are started or a job is queued.

    Raises:
        UserError: its place holds another checkpoint, or unfinished work of other settings.
        ArtifactLockedError: another process is making it here.
    """
    spec = checkpoint_spec(config)
    url = spec.resolve(config.out)
    if isinstance(config, DistillConfig):
        distill_specs.require_students(spec, config)
    made = find_existing(spec, config.out)
    if made is not None:
        remove_remote(url)
        return made
    check_unfinished(url, spec.record(), config.restart)
    if filesystem.is_local(url) and os.environ.get("RANK", "0") == "0":  # others would take it for their first rank's
        require_unlocked(filesystem.local_path(url))
    return None


def _train_here(room: Room, config: PretrainConfig | DistillConfig) -> Artifact:
    print_loading(room, "torch")
    trained: Artifact = importlib.import_module(_MODULES[room]).run(config)
    return trained


def _hold_gpu_slots(settings: Launch) -> AbstractContextManager[None]:
    """Slots of the concurrency limit that the settings name, waited for; a server out of reach does not end a training.

    Raises:
        UserError: there is no such limit.
    """
    if settings.concurrency_limit is None:
        return nullcontext()
    from flows.orchestration.concurrency import hold_slots

    return hold_slots(settings.concurrency_limit, settings.ranks(_visible_gpus))


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


@contextmanager
def _require_resumable(room: Room, url: str) -> Iterator[None]:
    """A Ctrl-C that ended the ranks before they reported anything.

    Raises:
        PreemptedError: instead of KeyboardInterrupt, where there is a saved state to resume from.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise interrupted_error(room, url) or error from None


@contextmanager
def _cancel_with_flow(config: PretrainConfig | DistillConfig, folder: Path) -> Iterator[None]:
    """End a SLURM job when the flow run that waits for it was cancelled; a worker that merely goes leaves it."""
    try:
        yield
    except BaseException:
        if config.launcher == "slurm" and _in_a_flow():
            from flows.orchestration.concurrency import is_being_cancelled

            if is_being_cancelled() and (job := slurm.cancel(folder)) is not None:
                print(f"SLURM job {job} is cancelled with its flow run", file=sys.stderr)
        raise


def _progress_callback(room: Room, folder: Path, config: PretrainConfig | DistillConfig) -> LaunchCallback:
    if not _in_a_flow():
        return LaunchCallback()
    from flows.orchestration.prefect_progress import progress_callback

    return progress_callback(room, folder, config.schedule.steps)


def _in_a_flow() -> bool:
    """Whether this process may run one: a command that is none must not take the seconds to import Prefect."""
    return "prefect" in sys.modules
