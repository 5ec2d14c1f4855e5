"""What a rank does in the tests of launching: tell who it is, then end as it is told to."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from infra.config import Config
from infra.errors import PreemptedError, UserError
from infra.launch.job import module_main


class Told(Config):
    """What to do."""

    folder: str
    """Where each rank leaves a file."""
    end: str = "well"
    """well, mistake, preempted, crash, killed; late: after 90 seconds, or as soon as it is asked to stop; late once:
    likewise at the first attempt, then well."""
    attempts: int = 1
    """With `preempted` and `killed`: end well from this attempt on."""


def main(told: Told) -> None:
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    rank = os.environ.get("RANK", "0")
    with (Path(told.folder) / f"rank-{rank}.txt").open("a") as file:
        file.write(" ".join(os.environ.get(name, "-") for name in variables) + f" pid={os.getpid()}\n")
    attempt = len((Path(told.folder) / f"rank-{rank}.txt").read_text().splitlines())
    print(f"rank {rank} was here", file=sys.stderr, flush=True)
    if told.end == "mistake":
        raise UserError("corpora: nothing here; fix the path")
    if told.end == "preempted" and attempt < told.attempts:
        raise PreemptedError("stopped after step 7, as asked")
    if told.end == "killed" and attempt < told.attempts:
        os.kill(os.getpid(), signal.SIGKILL)
    if told.end == "crash":
        raise AssertionError("a bug")
    if told.end == "late" or (told.end == "late once" and attempt == 1):
        time.sleep(90)  # longer than any test waits


if __name__ == "__main__":
    module_main(Told, main)
