"""Run a stage as a process of its own: a training must not share its process with an orchestrator."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from infra.errors import Preempted, UserError

M = TypeVar("M", bound=BaseModel)
USER_MISTAKE, TRY_AGAIN = 2, 75  # exit codes
_GRACE_SECONDS = 20
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def run_module(module: str, config: BaseModel) -> None:
    """Run `python -m module` on a configuration and wait for it; whatever ends this process ends that one too.

    Raises:
        UserError: what the module reported as the user's mistake.
        Preempted: it was asked to stop, and can go on from where it was.
        ChildProcessError: it failed otherwise; its traceback is on standard error.
    """
    with tempfile.TemporaryDirectory(prefix="fovea-") as scratch:
        job = Path(scratch)
        (job / "config.json").write_text(config.model_dump_json())
        (job / "parent").write_text(str(os.getpid()))
        process = subprocess.Popen([sys.executable, "-m", module, scratch], start_new_session=True)
        try:
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
        if code == USER_MISTAKE:
            raise UserError((job / "error.txt").read_text())
        if code == TRY_AGAIN:
            raise Preempted((job / "error.txt").read_text())
        if code:
            raise ChildProcessError(f"{module}: ended with exit code {code}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def module_main(model: type[M], run: Callable[[M], object]) -> None:
    """The body of a module that `run_module` starts."""
    job = Path(sys.argv[1])
    _end_with_parent(job / "parent")
    try:
        run(model.model_validate_json((job / "config.json").read_text()))
    except (UserError, ValidationError, Preempted) as error:
        (job / "error.txt").write_text(str(error))
        sys.stdout.flush()
        sys.exit(TRY_AGAIN if isinstance(error, Preempted) else USER_MISTAKE)


def _end_with_parent(parent: Path) -> None:
    """Ask Linux to kill this process when its parent dies, even by SIGKILL: two trainings must never share a folder."""
    if sys.platform == "linux" and parent.exists():
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != int(parent.read_text()):
            sys.exit("the process that started this one is gone")
