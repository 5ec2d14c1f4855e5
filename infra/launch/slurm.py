"""Ranks as a SLURM job, which queues itself again when it is preempted or its time is up.

`python -m infra.launch.slurm` prints, within a job, an address of its first node.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from infra.errors import UserError
from infra.launch.config import Launch
from infra.launch.logs import Tail

ENDED = "ended.json"
"""How a job says, in its folder, why it ended."""
_SCRIPT, _ID = "slurm.sh", "slurm.id"
_POLL_SECONDS = 2.0
_PATIENCE_SECONDS = 600.0  # with a controller that does not answer
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
_FIRST_PORT, _PORTS = 20_000, 10_000


def run(module: str, folder: Path, settings: Launch, queued: str | None) -> None:
    """Queue a job, unless one is `queued`, and show its output until it ends, if asked to wait.

    Raises:
        UserError: SLURM refuses the job or is not there.
        ChildProcessError: the job ended badly without a word of its own.
    """
    job = queued or _submit(module, folder, settings)
    if not settings.slurm.wait:
        return
    print(f"SLURM job {job}; interrupting this leaves it running, scancel {job} ends it", file=sys.stderr)
    tails = [Tail(folder, "slurm-*.log"), Tail(folder, "rank-*.log")]
    while (states := _states_by_and_by(job)) - _ENDED:
        time.sleep(_POLL_SECONDS)
        for tail in tails:
            tail.show()
    for tail in tails:
        tail.show(to_the_end=True)
    if states and "COMPLETED" not in states and not (folder / ENDED).exists():
        raise ChildProcessError(f"SLURM job {job}: {', '.join(sorted(states))}; see the logs in {folder}")


def script(module: str, folder: Path, settings: Launch) -> str:
    """What sbatch is given."""
    slurm, python = settings.slurm, shlex.quote(sys.executable)
    options = {
        "job-name": f"fovea-{module.rpartition('.')[2]}",
        "nodes": settings.nodes,
        "ntasks-per-node": settings.processes or slurm.gpus or 1,
        "gpus-per-node": slurm.gpus,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "output": f"{folder}".replace("%", "%%") + ("/slurm-%j.log" if slurm.chain == 1 else "/slurm-%A_%a.log"),
        "open-mode": "append",
        "signal": f"USR1@{slurm.notice}",
        "array": None if slurm.chain == 1 else f"1-{slurm.chain}%1",
    }
    lines = [f'--{name}="{value}"' for name, value in options.items() if value is not None]
    lines += ["--requeue" if slurm.chain == 1 else "--no-requeue", *slurm.options]
    rank = f"trap '' USR1; exec {python} -m {module} {shlex.quote(str(folder))}"  # deaf until it listens
    # Each rank saves its state and ends by itself: none may be killed because another was a moment faster. The shell
    # must outlive the signals that SLURM sends it too, to queue the job again; not if it was cancelled, though.
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in lines),
            "trap : TERM USR1",
            *slurm.setup,
            f"export MASTER_ADDR=$({python} -m infra.launch.slurm)",
            "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}",  # srun no longer takes it from sbatch by itself
            f"srun --kill-on-bad-exit=0 --wait=60 bash -c {shlex.quote(rank)}",
            "code=$?",
            *(_requeue(folder) if slurm.chain == 1 else ()),
            "exit $code",
            "",
        ]
    )


def _requeue(folder: Path) -> list[str]:
    """By what the ranks said: the exit code is that of the rank that ended worst."""
    said = f"grep -q '\"code\": 75' {shlex.quote(str(folder / ENDED))}"
    return [
        f'if {said} && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
    ]


def _submit(module: str, folder: Path, settings: Launch) -> str:
    path = folder / _SCRIPT
    path.write_text(script(module, folder.absolute(), settings))
    job = _ask(["sbatch", "--parsable", str(path)]).split(";")[0].strip()
    (folder / _ID).write_text(job)
    return job


def queued(folder: Path) -> str | None:
    """The job of this folder that has not ended yet."""
    if not (folder / _ID).exists():
        return None
    job = (folder / _ID).read_text()
    return job if _states(job) - _ENDED else None


def _states(job: str) -> set[str]:
    """States of a job, or of an array's jobs; none where SLURM has forgotten it."""
    try:
        return set(re.findall(r"\bJobState=(\w+)", _ask(["scontrol", "show", "job", "--oneliner", job])))
    except UserError as error:
        if "Invalid job id" in str(error):
            return set()
        raise


def _states_by_and_by(job: str) -> set[str]:
    """The same, asked again while the controller does not answer."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return _states(job)
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)


def _ask(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]}: not found; run this where SLURM's commands are, or choose another --launcher"
        ) from None
    if done.returncode:
        raise UserError(f"{command[0]}: {' '.join(done.stderr.split())}; mend launch.slurm or ask the cluster's people")
    return done.stdout


def adopt_environment() -> None:
    """Where srun started this process, say so in the variables that torch and DeepSpeed read."""
    found = os.environ
    # A batch script has SLURM_PROCID too, but is no task of a step.
    if "RANK" in found or "SLURM_STEP_ID" not in found or int(found.get("SLURM_NTASKS", "1")) == 1:
        return
    found["RANK"], found["WORLD_SIZE"] = found["SLURM_PROCID"], found["SLURM_NTASKS"]
    found["LOCAL_RANK"] = found["SLURM_LOCALID"]
    if "MASTER_ADDR" not in found:
        found["MASTER_ADDR"] = first_address()
    found.setdefault("MASTER_PORT", str(_FIRST_PORT + int(found["SLURM_JOB_ID"]) % _PORTS))


def first_address() -> str:
    """An address of a job's first node: its name need not resolve."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    first = _ask(["scontrol", "show", "hostnames", nodes]).split()[0]
    found = re.search(r"\bNodeAddr=(\S+)", _ask(["scontrol", "show", "node", "--oneliner", first]))
    return found[1] if found else first


if __name__ == "__main__":
    print(first_address())
