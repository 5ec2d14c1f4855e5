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
class JobStatus:
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


def get_status(job: str) -> JobStatus:
    """Ask about a job.

    Raises:
        UserError: SLURM is not there or does not answer.
    """
    try:
        lines = run_command(["scontrol", "show", "job", "--oneliner", job]).splitlines()
    except UserError as error:
        if "Invalid job id" in str(error):
            return JobStatus(frozenset(), {})
        raise
    jobs = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines if line.strip()]
    order = {"RUNNING": 0, "COMPLETING": 1, "PENDING": 2}
    jobs.sort(key=lambda fields: order.get(fields["JobState"], 3))
    return JobStatus(frozenset(fields["JobState"] for fields in jobs), jobs[0] if jobs else {})


def get_status_with_retries(job: str) -> JobStatus:
    """The same, asked again while the controller does not answer."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return get_status(job)
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


class JobMonitor:
    """Puts a job's way through the queue into words, each once."""

    def __init__(self, job: str) -> None:
        self.job = job
        self._last_message = ""
        self._restarts: int | None = None
        self._queue_read_at = -_QUEUE_SECONDS
        self._queue_position = ""

    def new_messages(self, status: JobStatus) -> list[str]:
        """What has changed since it was asked last."""
        lines = []
        if self._restarts is not None and status.restarts > self._restarts:
            lines.append(f"SLURM job {self.job} was queued again, {status.restarts} times so far")
        self._restarts = status.restarts
        words = self._describe(status)
        if words and words != self._last_message:
            lines.append(f"SLURM job {self.job} {words}")
            self._last_message = words
        return lines

    def _describe(self, status: JobStatus) -> str:
        fields, state = status.fields, status.fields.get("JobState", "")
        if state == "PENDING":
            return self._describe_wait(fields)
        if state == "RUNNING":
            return f"runs on {fields.get('NodeList', 'its nodes')}"
        code = fields.get("ExitCode", "")
        return f"ended: {state.lower()}, exit code {code}" if state and status.ended else ""

    def _describe_wait(self, fields: dict[str, str]) -> str:
        if time.monotonic() - self._queue_read_at >= _QUEUE_SECONDS:
            self._queue_read_at, self._queue_position = (
                time.monotonic(),
                _describe_queue_position(self.job, fields.get("Partition", "")),
            )
        parts = [f"waits{self._queue_position}"]
        if fields.get("Reason", "") not in _NOTHING:
            parts.append(f"because of {fields['Reason']}")
        if fields.get("StartTime", "") not in _NOTHING:
            parts.append(f"to start about {fields['StartTime']}")
        return ", ".join(parts)


def _describe_queue_position(job: str, partition: str) -> str:
    """Where in its partition's queue a job is, as words."""
    command = ["squeue", "--noheader", "--states=PENDING", "--sort=-p,i", "--format=%A"]
    try:
        waiting = run_command([*command, f"--partition={partition}"] if partition else command).split()
    except UserError:
        return ""
    return f", number {waiting.index(job) + 1} of {len(waiting)} in {partition}" if job in waiting else ""


def cancel(job: str, seconds: float) -> None:
    """Cancel a job, whose ranks then save their state and end, and wait some seconds for that."""
    run_command(["scancel", job])
    deadline = time.monotonic() + seconds
    while not get_status(job).ended and time.monotonic() < deadline:
        time.sleep(0.5)


def run_command(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
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
        raise UserError(
            f"{command[0]}: {' '.join(done.stderr.split())}; fix launch.slurm or ask the cluster's administrators"
        )
    return done.stdout
