"""The folder of a job: what its ranks are told, what they say, and how they ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
from pydantic import BaseModel, ValidationError

from infra.errors import EXIT_LOCKED, EXIT_PREEMPTED, EXIT_USER_ERROR, ArtifactLockedError, PreemptedError, UserError
from infra.launch import slurm
from infra.storage import filesystem

M = TypeVar("M", bound=BaseModel)
_VARIABLE, _TIE = "FOVEA_JOB", "FOVEA_TIED_TO"
_CONFIG = "config.json"
_PARENT_SECONDS = 1.0  # between looks at whether it still lives


@dataclass(frozen=True)
class ExitStatus:
    """How a job ended, by its own account."""

    code: int
    message: str


class Job:
    """One job's folder, which all its machines share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, config: BaseModel) -> None:
        """Write what the ranks are told."""
        self.folder.mkdir(parents=True, exist_ok=True)
        filesystem.write_atomic(str(self.folder / _CONFIG), config.model_dump_json().encode())
        (self.folder / slurm.ENDED).unlink(missing_ok=True)

    def has_same_config(self, config: BaseModel) -> bool:
        """Whether this is what the ranks were told, however they are launched."""
        told, asked = (json.loads(text) for text in ((self.folder / _CONFIG).read_text(), config.model_dump_json()))
        return all(told.get(name) == value for name, value in asked.items() if name != "launch")

    def config(self, model: type[M]) -> M:
        return model.model_validate_json((self.folder / _CONFIG).read_text())

    def report(self, code: int, message: str) -> None:
        filesystem.write_atomic(str(self.folder / slurm.ENDED), json.dumps({"code": code, "message": message}).encode())

    def exit_status(self) -> ExitStatus | None:
        """What the ranks reported; None where they ended well, or without a word."""
        with suppress(FileNotFoundError):
            return ExitStatus(**json.loads((self.folder / slurm.ENDED).read_text()))
        return None

    def log_path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.log"


def parent_tether_env() -> dict[str, str]:
    """Variables that make ranks of this machine end with this process, even where it is killed."""
    return {_TIE: f"{os.getpid()} {psutil.Process().create_time()}"}


def parent_is_alive() -> bool:
    """Whether the process that this one is tied to is there."""
    pid, created = os.environ[_TIE].split()
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(pid))
        return process.create_time() == float(created) and process.status() != psutil.STATUS_ZOMBIE
    return False


def report(code: int, message: str) -> None:
    """Say in the folder of the job that this process belongs to, if it belongs to one, why it ends."""
    if folder := os.environ.get(_VARIABLE):
        Job(Path(folder)).report(code, message)


def module_main(model: type[M], run: Callable[[M], object]) -> None:
    """The body of a module that is started with a job's folder, once for each rank."""
    job = Job(Path(sys.argv[1]))
    os.environ[_VARIABLE] = str(job.folder)
    slurm.adopt_environment()
    _set_up_rank(job, int(os.environ.get("RANK", 0)))
    try:
        run(job.config(model))
    except (UserError, ValidationError, PreemptedError) as error:
        code = {PreemptedError: EXIT_PREEMPTED, ArtifactLockedError: EXIT_LOCKED}.get(type(error), EXIT_USER_ERROR)
        job.report(code, str(error))
        if _TIE not in os.environ:  # nobody may be there to tell it
            print(f"fovea: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        sys.exit(code)
    finally:  # a request that comes while the interpreter ends would kill it
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _set_up_rank(job: Job, rank: int) -> None:
    if rank == 0:
        (job.folder / slurm.ENDED).unlink(missing_ok=True)  # of an attempt that was preempted
    else:  # the first rank keeps the terminal, and its progress bar
        with job.log_path(rank).open("ab") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
            os.dup2(log.fileno(), sys.stderr.fileno())
    if _TIE in os.environ:
        threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _raise_preempted)


def _end_with_parent() -> None:
    """End this process when the one it is tied to is gone, even by SIGKILL: two trainings must never share a folder."""
    while parent_is_alive():
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _raise_preempted(number: int, frame: object) -> None:
    for each in (signal.SIGTERM, signal.SIGUSR1):  # once is enough
        signal.signal(each, signal.SIG_IGN)
    raise PreemptedError("stopped outside a training, as asked; run again to resume")
