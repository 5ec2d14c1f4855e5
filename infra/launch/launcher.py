"""Start a stage's module and wait for it: a training must not share its process with an orchestrator."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import psutil
from pydantic import BaseModel

from infra.errors import (
    EXIT_LOCKED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    ArtifactLockedError,
    PreemptedError,
    RankDiedError,
    UserError,
)
from infra.launch import slurm
from infra.launch.callback import LaunchCallback
from infra.launch.config import Launch, Launcher, Slurm
from infra.launch.job import Job, parent_tether_env
from infra.launch.logs import Tail

_GRACE_SECONDS = 20
_POLL_SECONDS = 0.2
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 300.0  # before ranks are started again
_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LONGEST_RANK = len(["python", "-u", "-m", "module", "folder"])  # commands of launchers are longer


def run_module(module: str, config: BaseModel) -> None:
    """Run `python -m module` on a configuration in one process and wait for it; see `launch`."""
    with tempfile.TemporaryDirectory(prefix="fovea-") as scratch:
        launch(module, config, Path(scratch), "local", Launch())


def launch(
    module: str,
    config: BaseModel,
    folder: Path,
    launcher: Launcher,
    settings: Launch,
    callback: LaunchCallback | None = None,
) -> None:
    """Run a module on a configuration in the ranks that are asked for, and wait for them.

    Whatever ends this process ends them too, except for a SLURM job.

    Args:
        folder: the job's, shared by all its machines.

    Raises:
        UserError: what the module reported as the user's mistake.
        ArtifactLockedError: another process makes the same.
        PreemptedError: it was asked to stop, and can go on from where it was.
        RankDiedError: a rank died more often than `settings.max_restarts` allows; its log may hold a traceback.
        ChildProcessError: it failed otherwise.
    """
    _require_settings_are_read(launcher, settings)
    callback, job = callback or LaunchCallback(), Job(folder)
    # A SLURM job goes on when who waits for it is asked to stop; ranks of our own are asked in turn.
    listening: AbstractContextManager[list[int]] = nullcontext([]) if launcher == "slurm" else _listen_for_signals()
    with listening as signals:
        for attempt in range(settings.max_restarts + 1):
            try:
                _run_once(module, config, job, launcher, settings, callback, signals)
                return
            except RankDiedError as error:
                if signals:
                    raise PreemptedError(f"{error} when asked to stop; run again to resume") from None
                if attempt == settings.max_restarts:
                    raise
                callback.on_message(f"{error}; started again, {attempt + 1} of at most {settings.max_restarts} times")
                _pause(min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS), signals)


def _pause(seconds: float, signals: Sequence[int]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if signals:
            raise PreemptedError(
                "stopped between two attempts, as asked; run again to resume from the last saved state"
            )
        time.sleep(_POLL_SECONDS)


def _run_once(
    module: str,
    config: BaseModel,
    job: Job,
    launcher: Launcher,
    settings: Launch,
    callback: LaunchCallback,
    signals: Sequence[int],
) -> None:
    if launcher == "slurm":
        code = _run_on_slurm(module, config, job, settings, callback)
    else:
        job.prepare(config)
        command, environment = _command(module, job, launcher, settings), _environment(launcher, settings)
        code = _run(command, job, environment, callback, signals)
    raise_for_exit(module, code, job)


def _require_settings_are_read(launcher: Launcher, settings: Launch) -> None:
    """Refuse settings that a launcher would not read."""
    unread = {
        "hostfile": launcher != "deepspeed" and settings.hostfile is not None,
        "rdzv_endpoint": launcher in ("local", "slurm") and settings.rdzv_endpoint is not None,
        "slurm": launcher != "slurm" and settings.slurm != Slurm(),
        "nnodes": launcher == "deepspeed" and settings.hostfile is not None and settings.nnodes > 1,
    }
    for name in (name for name, is_unread in unread.items() if is_unread):
        raise UserError(f"launch.{name}: not read by --launcher {launcher}; leave it out or choose another launcher")


def _run_on_slurm(module: str, config: BaseModel, job: Job, settings: Launch, callback: LaunchCallback) -> int:
    queued = slurm.queued(job.folder)
    if queued is None:
        job.prepare(config)
    elif not job.has_same_config(config):
        raise UserError(f"{job.folder}: SLURM job {queued} has other settings; scancel it or choose another --out")
    slurm.run(module, job.folder, settings, queued, callback)
    return 0 if job.exit_status() is None or not settings.slurm.wait else 1


def raise_for_exit(module: str, code: int, job: Job) -> None:
    """Raise the error that a job's ranks reported; nothing where they ended with exit code 0."""
    ended = job.exit_status()
    if code == 0:
        return
    if ended is None:
        raise RankDiedError(f"{module}: ended with exit code {code}")
    if ended.code == EXIT_USER_ERROR:
        raise UserError(ended.message)
    if ended.code == EXIT_LOCKED:
        raise ArtifactLockedError(ended.message)
    if ended.code == EXIT_PREEMPTED:
        raise PreemptedError(ended.message)
    raise ChildProcessError(f"{module}: {ended.message}")


def _command(module: str, job: Job, launcher: Launcher, settings: Launch) -> list[str]:
    last = [module, str(job.folder)]
    if launcher == "torchrun":
        return [*_torchrun(settings), "-m", *last]
    if launcher == "deepspeed":
        return [*_deepspeed(settings), "--module", "--no_local_rank", *last]
    return [sys.executable, "-m", *last]


def _torchrun(settings: Launch) -> list[str]:
    if settings.nnodes > 1 and settings.rdzv_endpoint is None:
        raise UserError("launch.rdzv_endpoint: required for several machines; give HOST:PORT of the first one")
    where = ["--standalone"]
    if settings.rdzv_endpoint is not None:
        where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", settings.rdzv_endpoint, "--rdzv-id", "fovea"]
    ranks = ["--nnodes", str(settings.nnodes), "--nproc-per-node", str(_processes(settings))]
    return [sys.executable, "-m", "torch.distributed.run", *where, *ranks]


def _deepspeed(settings: Launch) -> list[str]:
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning", "--no_ssh_check"]
    if settings.hostfile is None:
        if settings.nnodes > 1:
            raise UserError("launch.hostfile: required for several machines; give a file of lines HOST slots=N")
        return [*runner, "--num_gpus", str(_processes(settings)), "--master_port", str(_free_port())]
    if not Path(settings.hostfile).is_file():
        raise UserError(
            f"launch.hostfile: {settings.hostfile}: no such file; write a line HOST slots=N for each machine"
        )
    count = [] if settings.nproc_per_node is None else ["--num_gpus", str(settings.nproc_per_node)]
    host, _, port = (settings.rdzv_endpoint or "").rpartition(":")
    meet = ["--master_addr", host, "--master_port", port] if host else []
    return [*runner, "--hostfile", settings.hostfile, *count, *meet]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _processes(settings: Launch) -> int:
    if settings.nproc_per_node is not None:
        return settings.nproc_per_node
    import torch

    return max(torch.cuda.device_count(), 1)


def _environment(launcher: Launcher, settings: Launch) -> dict[str, str]:
    """Ranks that share a machine share its cores too."""
    environment = os.environ | parent_tether_env()
    if launcher != "local":
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // _processes(settings), 1)))
    return environment


def _run(
    command: list[str], job: Job, environment: dict[str, str], callback: LaunchCallback, signals: Sequence[int]
) -> int:
    """Run a command of this machine to its end, showing the ranks' logs; return its exit code."""
    tail = Tail(job.folder, "rank-*.log")
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_ignore_signals)
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_SECONDS)
            tail.show()
            callback.on_poll()
            if signals:  # again and again: a rank may just have started
                _forward_signal(process, job)
    except BaseException as error:
        _stop(process, job)
        ended = job.exit_status()
        if isinstance(error, KeyboardInterrupt) and ended is not None and ended.code == EXIT_PREEMPTED:
            raise PreemptedError(ended.message) from None
        if ended is not None:
            print(f"fovea: {ended.message}", file=sys.stderr)
        raise
    finally:
        tail.show(to_the_end=True)


def _ignore_signals() -> None:
    """Until a rank listens, requests to stop must not kill it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@contextmanager
def _listen_for_signals() -> Iterator[list[int]]:
    """The requests to stop that this process has got, unless somebody else answers to them (an orchestrator, say)."""
    taken, heard = [], []
    for number in _FORWARDED_SIGNALS:
        with suppress(ValueError):  # not the main thread, which alone hears signals
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, lambda number, frame: heard.append(number))
                taken.append(number)
    try:
        yield heard
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _forward_signal(process: subprocess.Popen[bytes], job: Job) -> None:
    """Ask every rank of this machine to save its state and end. Launchers would not: they kill after some seconds."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        for each in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                command = each.cmdline()
                if command[-1:] == [str(job.folder)] and len(command) <= _LONGEST_RANK:
                    each.send_signal(signal.SIGUSR1)


def _stop(process: subprocess.Popen[bytes], job: Job) -> None:
    """Ask the ranks to save and end, and wait for that for some seconds; a Ctrl-C meanwhile ends them at once."""
    deadline = time.monotonic() + _GRACE_SECONDS
    try:
        while process.poll() is None and time.monotonic() < deadline:
            _forward_signal(process, job)
            with suppress(subprocess.TimeoutExpired):
                process.wait(1)
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS / 4)
    except KeyboardInterrupt:
        pass
    process.kill()
    process.wait()
