"""How the processes of a training are started: no part of what its result is known by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from infra.config import Config

Launcher = Literal["local", "torchrun", "deepspeed", "slurm"]


class Slurm(Config):
    """Resources and options of a SLURM job."""

    partition: str | None = None
    """Partition. null: the cluster's default."""
    account: str | None = None
    """Account that is charged. null: the user's default."""
    qos: str | None = None
    """Quality of service. null: the cluster's default."""
    time: str | None = None
    """Time limit in SLURM's form, such as 12:00:00 or 2-00:00:00. null: the partition's limit."""
    gpus_per_node: int | None = Field(None, ge=1)
    """Number of GPUs on each node. null: requests none."""
    signal_before_s: int = Field(180, ge=60)
    """Seconds before the time limit at which the job saves its state and is requeued. SLURM may send the signal a
    minute late."""
    array_jobs: int = Field(1, ge=1)
    """Number of jobs of an array that run one after another, each resuming the previous one, for clusters that do not
    allow requeueing."""
    sbatch_args: list[str] = Field(default_factory=list)
    """Further options of sbatch, such as --exclude=n3; as a flag: --launch.slurm.sbatch-args=--exclude=n3."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines that run before the ranks start, such as module load cuda."""
    wait: bool = True
    """Wait for the job and show its output. false returns once the job is queued."""


class Launch(Config):
    """Where and how the ranks of a training start."""

    nnodes: int = Field(1, ge=1)
    """Number of machines."""
    nproc_per_node: int | None = Field(None, ge=1)
    """Number of ranks on each machine. null: one for each GPU, or one without a GPU."""
    rdzv_endpoint: str | None = None
    """Address HOST:PORT of the first of several machines. With torchrun, run the same command on each machine.
    DeepSpeed's launcher can find the address itself."""
    hostfile: str | None = None
    """Path of a DeepSpeed hostfile with a line "host slots=8" for each machine; all are reached by ssh."""
    max_restarts: int = Field(0, ge=0)
    """Maximum number of restarts from the last saved state after ranks died without a message: killed, a lost machine,
    a CUDA or NCCL error. Errors that the training reports, such as a wrong setting, end it at once."""
    concurrency_limit: str | None = None
    """Name of a Prefect global concurrency limit. A training takes one slot for each of its ranks, which shares out the
    GPUs of machines without a scheduler; see docs/cluster.md. null: no limit."""
    job_dir: str | None = None
    """Folder for the job's settings and the log of every rank. null: beside `out`, ending in .job; for a remote `out`,
    in $FOVEA_CACHE, which several machines must share."""
    slurm: Slurm = Slurm()
    """SLURM's resources and options."""

    def job_folder(self, work: Path) -> Path:
        """The job's folder, of a training that works in some local folder."""
        work = work.absolute()
        return work.with_name(f"{work.name}.job") if self.job_dir is None else Path(self.job_dir).expanduser()

    def ranks(self, visible_gpus: Callable[[], int]) -> int:
        """How many there are altogether; of a node with nothing said, as many as GPUs are visible here."""
        return self.nnodes * (self.nproc_per_node or self.slurm.gpus_per_node or max(visible_gpus(), 1))

    @model_validator(mode="after")
    def _machines_are_named(self) -> Launch:
        if self.rdzv_endpoint is not None and ":" not in self.rdzv_endpoint:
            raise ValueError("rdzv_endpoint is HOST:PORT of the first machine")
        return self
