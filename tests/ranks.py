"""Ranks forked from a process that has imported what they need: starting one takes no seconds of imports.

Tests of launching itself start real launchers (`tests/test_infra_launch.py`).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from pydantic import BaseModel

from infra.launch.job import Job
from infra.launch.launcher import raise_for_exit
from tests.daemons import free_ports

_PRELOADED = ["deepspeed", "pretrain.trainer", "pretrain.train", "distill.train.distill"]
_SECONDS = 400.0
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Ended:
    """How the ranks of a job ended."""

    codes: list[int]
    """Exit code of each rank; negative: the signal that killed it."""
    errors: list[str]
    """Standard error of each rank, as far as the rank has not sent it to its log."""

    @property
    def returncode(self) -> int:
        """0 where all ranks ended well."""
        return next((code for code in self.codes if code), 0)


def run_ranks(program: str | Path, config: BaseModel, folder: Path, count: int = 2) -> Ended:
    """Run a module, or a script, in some ranks to their end. A failing rank takes the others along, as under torchrun.

    Args:
        program: what each rank runs: the name of a package with `__main__`, or the path of a script.
        folder: of the job.
    """
    Job(folder).prepare(config)
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    shared = {**os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    logs = [folder / f"stderr-{rank}.txt" for rank in range(count)]
    ranks = [
        _CONTEXT.Process(
            target=_run_rank,
            args=(str(program), folder, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, logs[rank]),
        )
        for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    _wait(ranks)
    ended = Ended([int(rank.exitcode or 0) for rank in ranks], [log.read_text(errors="replace") for log in logs])
    print(*ended.errors, sep="\n", file=sys.stderr)
    return ended


def run_module(module: str, config: BaseModel) -> None:
    """Run a stage in one rank, as `infra.launch.launcher.run_module` does.

    Raises:
        UserError: what the stage reported as the user's mistake.
    """
    with tempfile.TemporaryDirectory(prefix="fovea-") as scratch:
        ended = run_ranks(module, config, Path(scratch), 1)
        raise_for_exit(module, ended.returncode, Job(Path(scratch)))


def _wait(ranks: Sequence[ForkServerProcess]) -> None:
    deadline = time.monotonic() + _SECONDS
    left = list(ranks)
    while left:
        wait([rank.sentinel for rank in left], timeout=1)
        failed = [rank for rank in ranks if rank.exitcode not in (None, 0)]
        if failed or time.monotonic() > deadline:
            for rank in ranks:
                rank.join(5 if failed else 0)  # those that notice the failure by themselves may report it
                rank.kill()
                rank.join()
        left = [rank for rank in ranks if rank.exitcode is None]


def _run_rank(program: str, folder: Path, environment: dict[str, str], log: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = [program, str(folder)]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
