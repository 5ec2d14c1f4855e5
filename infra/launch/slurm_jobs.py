"""A SLURM job as SLURM's commands tell of it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infra.errors import UserError

POLL_SECONDS = 2.0
_PATIENCE_SECONDS = 600.0  # with a controller that does not answer
_QUEUE_SECONDS = 60.0  # between looks at the whole queue
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
_NOTHING = {"", "(null)", "None", "Unknown", "N/A"}


@dataclass(frozen=True)
class Look:
    """What a job, or an array of jobs, is doing; no states where SLURM has forgotten it."""

    states: frozenset[str]
    fields: dict[str, str]
    """Of the job that runs, or waits longest, or ended last"""

    @property
    def ended(self) -> bool:
        return not self.states - _ENDED

    @property
    def preempted(self) -> bool:
        """Whether it had to make room: for good where it is not queued again within some seconds."""
        return self.states == {"PREEMPTED"}

    @property
    def failed(self) -> bool:
        """Whether it has not been seen to end well: one that SLURM has forgotten meanwhile may have failed too."""
        return (self.ended or self.preempted) and "COMPLETED" not in self.states

    @property
    def restarts(self) -> int:
        return int(self.fields.get("Restarts", 0))


def look(job: str) -> Look:
    """Ask about a job.

    Raises:
        UserError: SLURM is not there or does not answer.
    """
    try:
        told = ask(["scontrol", "show", "job", "--oneliner", job]).splitlines()
    except UserError as error:
        if "Invalid job id" in str(error):
            return Look(frozenset(), {})
        raise
    jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in told if line.strip()]
    order = {"RUNNING": 0, "COMPLETING": 1, "PENDING": 2}
    jobs.sort(key=lambda fields: order.get(fields["JobState"], 3))
    return Look(frozenset(fields["JobState"] for fields in jobs), jobs[0] if jobs else {})


def look_by_and_by(job: str) -> Look:
    """The same, asked again while the controller does not answer."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return look(job)
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


class Followed:
    """Puts a job's way through the queue into words, each once."""

    def __init__(self, job: str) -> None:
        self.job = job
        self._said = ""
        self._restarts: int | None = None
        self._asked = -_QUEUE_SECONDS
        self._place = ""

    def news(self, seen: Look) -> list[str]:
        """What has changed since it was asked last."""
        lines = []
        if self._restarts is not None and seen.restarts > self._restarts:
            lines.append(f"SLURM job {self.job} was queued again, {seen.restarts} times so far")
        self._restarts = seen.restarts
        words = self._words(seen)
        if words and words != self._said:
            lines.append(f"SLURM job {self.job} {words}")
            self._said = words
        return lines

    def _words(self, seen: Look) -> str:
        fields, state = seen.fields, seen.fields.get("JobState", "")
        if state == "PENDING":
            return self._waiting(fields)
        if state == "RUNNING":
            return f"runs on {fields.get('NodeList', 'its nodes')}"
        code = fields.get("ExitCode", "")
        return f"ended: {state.lower()}, exit code {code}" if state and seen.ended else ""

    def _waiting(self, fields: dict[str, str]) -> str:
        if time.monotonic() - self._asked >= _QUEUE_SECONDS:
            self._asked, self._place = time.monotonic(), _place(self.job, fields.get("Partition", ""))
        told = [f"waits{self._place}"]
        if fields.get("Reason", "") not in _NOTHING:
            told.append(f"because of {fields['Reason']}")
        if fields.get("StartTime", "") not in _NOTHING:
            told.append(f"to start about {fields['StartTime']}")
        return ", ".join(told)


def _place(job: str, partition: str) -> str:
    """Where in its partition's queue a job is, as words."""
    command = ["squeue", "--noheader", "--states=PENDING", "--sort=-p,i", "--format=%A"]
    try:
        waiting = ask([*command, f"--partition={partition}"] if partition else command).split()
    except UserError:
        return ""
    return f", number {waiting.index(job) + 1} of {len(waiting)} in {partition}" if job in waiting else ""


def cancel(job: str, seconds: float) -> None:
    """Cancel a job, whose ranks then save their state and end, and wait some seconds for that."""
    ask(["scancel", job])
    deadline = time.monotonic() + seconds
    while not look(job).ended and time.monotonic() < deadline:
        time.sleep(0.5)


def ask(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What one of SLURM's commands prints, in this process's environment or another.

    Raises:
        UserError: it is not there, or complains.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]}: not found; run this where SLURM's commands are, or choose another --launcher"
        ) from None
    if done.returncode:
        raise UserError(f"{command[0]}: {' '.join(done.stderr.split())}; mend launch.slurm or ask the cluster's people")
    return done.stdout
