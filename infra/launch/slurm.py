"""Ranks as a SLURM job, which queues itself again when it is preempted or its time is up.

`python -m infra.launch.slurm` prints, within a job, an address of its first node.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from pathlib import Path

from infra.errors import PreemptedError, RankDiedError
from infra.launch import slurm_status
from infra.launch.callback import LaunchCallback
from infra.launch.config import Launch
from infra.launch.logs import Tail
from infra.launch.slurm_status import run_command

ENDED = "exit_status.json"
"""How a job says, in its folder, why it ended."""
_SCRIPT, _ID = "slurm.sh", "slurm.id"
_SAVING_SECONDS = 25.0
_PREEMPTED_LOOKS = 15  # until what made room is taken for ended
_FIRST_PORT, _PORTS = 20_000, 10_000


def run(module: str, folder: Path, settings: Launch, queued: str | None, callback: LaunchCallback) -> None:
    """Queue a job, unless one is `queued`, and follow it until it ends, if asked to wait: where it is in the queue, on
    which nodes it runs, that it was queued again, what it prints, how it ends.

    Raises:
        UserError: SLURM refuses the job or is not there.
        PreemptedError: somebody cancelled the job before its ranks could say so.
        RankDiedError: the job ended badly without a word of its own.
    """
    job = queued or _submit(module, folder, settings)
    if not settings.slurm.wait:
        return
    callback.on_message(f"SLURM job {job}; interrupting this leaves it running, scancel {job} ends it")
    followed = slurm_status.JobMonitor(job)
    tails = [Tail(folder, "slurm-*.log"), Tail(folder, "rank-*.log")]
    waited = 0
    while not (seen := slurm_status.get_status_with_retries(job)).ended and waited < _PREEMPTED_LOOKS:
        waited = waited + 1 if seen.preempted else 0
        for line in followed.new_messages(seen):
            callback.on_message(line)
        time.sleep(slurm_status.POLL_SECONDS)
        for tail in tails:
            tail.show()
        callback.on_poll()
    for tail in tails:
        tail.show(to_the_end=True)
    for line in followed.new_messages(seen):
        callback.on_message(line)
    if (folder / ENDED).exists():
        return
    if seen.states == {"CANCELLED"}:
        raise PreemptedError(f"SLURM job {job} was cancelled; run again to resume from its last saved state")
    if seen.failed:
        raise RankDiedError(f"SLURM job {job}: {', '.join(sorted(seen.states))}; see the logs in {folder}")


def script(module: str, folder: Path, settings: Launch) -> str:
    """What sbatch is given."""
    slurm, python = settings.slurm, shlex.quote(sys.executable)
    options = {
        "job-name": f"fovea-{module.rpartition('.')[2]}",
        "nodes": settings.nnodes,
        "ntasks-per-node": settings.nproc_per_node or slurm.gpus_per_node or 1,
        "gpus-per-node": slurm.gpus_per_node,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "output": f"{folder}".replace("%", "%%") + ("/slurm-%j.log" if slurm.array_jobs == 1 else "/slurm-%A_%a.log"),
        "open-mode": "append",
        "signal": f"USR1@{slurm.signal_before_s}",
        "array": None if slurm.array_jobs == 1 else f"1-{slurm.array_jobs}%1",
    }
    lines = [f'--{name}="{value}"' for name, value in options.items() if value is not None]
    lines += ["--requeue" if slurm.array_jobs == 1 else "--no-requeue", *slurm.sbatch_args]
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
            *(_requeue(folder) if slurm.array_jobs == 1 else ()),
            "exit $code",
            "",
        ]
    )


def _requeue(folder: Path) -> list[str]:
    """By what the ranks said: the exit code is that of the rank that ended worst."""
    said = f"grep -qs '\"code\": 75' {shlex.quote(str(folder / ENDED))}"
    return [
        f'if {said} && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
    ]


def _submit(module: str, folder: Path, settings: Launch) -> str:
    path = folder / _SCRIPT
    path.write_text(script(module, folder.absolute(), settings))
    # Where this process is in a job itself, what that job was given is none of the new one's business.
    environment = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not _of_job(name)}
    job = run_command(["sbatch", "--parsable", str(path)], environment).split(";")[0].strip()
    (folder / _ID).write_text(job)
    return job


def _of_job(variable: str) -> bool:
    return variable.startswith(("SLURM_", "SRUN_"))


def queued(folder: Path) -> str | None:
    """The job of this folder that has not ended yet."""
    if not (folder / _ID).exists():
        return None
    job = (folder / _ID).read_text()
    seen = slurm_status.get_status(job)
    return None if seen.ended or seen.preempted else job


def cancel(folder: Path) -> str | None:
    """Cancel this folder's job, if it has not ended, and give its ranks the time to save their state; return it."""
    if (job := queued(folder)) is not None:
        slurm_status.cancel(job, _SAVING_SECONDS)
    return job


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
    first = run_command(["scontrol", "show", "hostnames", nodes]).split()[0]
    found = re.search(r"\bNodeAddr=(\S+)", run_command(["scontrol", "show", "node", "--oneliner", first]))
    return found[1] if found else first


if __name__ == "__main__":
    print(first_address())
