"""How the processes of a training are started: no part of what its result is known by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from infra.config import Config

Launcher = Literal["local", "torchrun", "deepspeed", "slurm"]


class Slurm(Config):
    """What is asked of SLURM beside nodes and tasks."""

    partition: str | None = None
    """The partition; null: the cluster's default."""
    account: str | None = None
    """Who is charged."""
    qos: str | None = None
    """Quality of service."""
    time: str | None = None
    """Time limit, as SLURM writes it: 12:00:00, 2-00:00:00; null: the partition's."""
    gpus_per_node: int | None = Field(None, ge=1)
    """GPUs a node; null: none is asked for."""
    signal_before_s: int = Field(180, ge=60)
    """Seconds before the time limit at which the state is saved and the job queued again; SLURM may be a minute
    late."""
    array_jobs: int = Field(1, ge=1)
    """Jobs that follow one another as an array, each going on where the last one ended, where requeueing is not
    allowed."""
    sbatch_args: list[str] = Field(default_factory=list)
    """Further options of sbatch, such as --exclude=n3; as a flag: --launch.slurm.sbatch-args=--exclude=n3."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines before the ranks start, such as module load cuda."""
    wait: bool = True
    """Stay and show the job's output until it ends; false (--launch.slurm.wait=false): return once it is queued."""


class Launch(Config):
    """Where ranks run. Of several machines, all must see the same --out and job folder."""

    nnodes: int = Field(1, ge=1)
    """Machines."""
    nproc_per_node: int | None = Field(None, ge=1)
    """Ranks a machine; null: one a GPU, or one where there is none."""
    rdzv_endpoint: str | None = None
    """HOST:PORT of the first of several machines. Under torchrun the same command is run on each of them; DeepSpeed's
    launcher finds it out by itself, if it may."""
    hostfile: str | None = None
    """deepspeed on several machines: a file of lines "host slots=8", all reached by ssh."""
    max_restarts: int = Field(0, ge=0)
    """How often ranks that ended without a word (killed, a machine lost, an error in CUDA or NCCL) are started again,
    from the last saved state. What the training itself reports, such as a wrong setting, ends it at once."""
    concurrency_limit: str | None = None
    """Name of a Prefect global concurrency limit, of which a training takes a slot for each of its ranks; see
    docs/cluster.md. For machines whose GPUs no scheduler shares out."""
    job_dir: str | None = None
    """Folder for the job's settings and every rank's log; null: beside --out, ending in .job; for a remote --out, in
    $FOVEA_CACHE, which several machines must then share."""
    slurm: Slurm = Slurm()
    """What is asked of SLURM."""

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
