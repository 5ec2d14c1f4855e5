"""Trainings on a real SLURM cluster of two nodes: preempted, out of time, cancelled, or one job after another."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.artifacts.artifact import find
from infra.config import Config
from infra.errors import PreemptedError, UserError
from infra.launch.config import Launch
from infra.launch.config import Slurm as SlurmSettings
from infra.launch.launcher import launch
from tests.conftest import SyntheticCorpora
from tests.rank_program import Told
from tests.slurm_cluster import Slurm, missing, slurm_cluster
from tests.test_pretrain_scale import ALIKE
from tests.test_pretrain_training import config, losses

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(missing() is not None, reason=missing() or "")]

PATIENCE = 120.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as slurm, pytest.MonkeyPatch.context() as patch:
        for name in ("SLURM_CONF", "PATH"):
            patch.setenv(name, slurm.environment[name])
        patch.setenv("OMP_NUM_THREADS", "1")
        yield slurm


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def job_of(folder: Path) -> str:
    until((folder / "slurm.id").exists)
    return (folder / "slurm.id").read_text()


def field(cluster: Slurm, job: str, name: str) -> str:
    found = re.search(rf"\b{name}=(\S+)", cluster.run("scontrol", "show", "job", "--oneliner", job))
    assert found
    return found[1]


def command(settings: Config, file: Path) -> list[str]:
    """The command line of a training."""
    file.write_text(settings.model_dump_json())  # JSON is YAML
    return [sys.executable, "-c", "from flows.cli.main import main; main()", "pretrain", str(file)]


def test_a_job_over_two_nodes_is_preempted_and_ends_as_the_uninterrupted_one(
    cluster: Slurm, synthetic: SyntheticCorpora, tmp_path: Path
) -> None:
    changes = {
        **ALIKE,
        "schedule": {"steps": 150, "global_batch_size": 16},
        "runtime": {"num_workers": 1, "checkpoint_every": 20},
    }
    two = {"launcher": "slurm", "launch": {"nnodes": 2, "nproc_per_node": 1}, "sharding": {"zero_stage": 2}}
    whole = config(synthetic.seed, tmp_path / "whole", **changes, **two)
    assert subprocess.run(command(whole, tmp_path / "whole.yaml"), timeout=PATIENCE).returncode == 0

    settings = config(synthetic.seed, tmp_path / "run", **changes, **two)
    client = subprocess.Popen(command(settings, tmp_path / "run.yaml"), stderr=subprocess.PIPE, text=True)
    job = job_of(tmp_path / "run.job")
    until((tmp_path / "run" / "checkpoints" / "step-20" / "train_state.json").exists)
    cluster.run("sbatch", "--partition=high", "--nodes=2", f"--output={tmp_path}/high.txt", "--wrap=sleep 3")
    _, shown = client.communicate(timeout=PATIENCE)
    assert client.returncode == 0, shown
    assert field(cluster, job, "Restarts") == "1"
    assert field(cluster, job, "JobState") == "COMPLETED"
    assert "stopped after step" in (tmp_path / "run.job" / f"slurm-{job}.log").read_text()
    for line in ("runs on n[1-2]", "waits", "was queued again, 1 times so far", "ended: completed, exit code 0:0"):
        assert f"SLURM job {job} {line}" in shown
    assert "pretrain: 150 in " in shown  # the first rank's progress, from the other side of the cluster
    artifact = find(str(tmp_path / "run"))
    assert artifact is not None
    assert 0 < artifact.metrics["resumed_at"] < 150
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_mistake_in_a_job_is_the_command_s_one_line(
    cluster: Slurm, synthetic: SyntheticCorpora, tmp_path: Path
) -> None:
    odd = {
        "launcher": "slurm",
        "launch": {"nnodes": 2, "nproc_per_node": 1},
        "schedule": {"steps": 2, "global_batch_size": 15},
    }
    settings = config(synthetic.seed, tmp_path / "run", **odd)
    done = subprocess.run(command(settings, tmp_path / "odd.yaml"), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fovea: schedule.global_batch_size: 15 is no multiple of 2 ranks")


def told(tmp_path: Path, end: str, attempts: int = 1) -> Told:
    (tmp_path / "ranks").mkdir()
    return Told(folder=str(tmp_path / "ranks"), end=end, attempts=attempts)


def test_jobs_of_a_chain_follow_one_another(cluster: Slurm, tmp_path: Path) -> None:
    settings = Launch(nnodes=2, nproc_per_node=1, slurm=SlurmSettings(array_jobs=3))
    launch("tests.rank_program", told(tmp_path, "preempted", attempts=3), tmp_path / "my job", "slurm", settings)
    assert len((tmp_path / "ranks" / "rank-1.txt").read_text().splitlines()) == 3
    assert len(list((tmp_path / "my job").glob("slurm-*_[123].log"))) == 3


def test_a_job_that_is_cancelled_before_it_runs_is_not_queued_again(cluster: Slurm, tmp_path: Path) -> None:
    held = SlurmSettings(sbatch_args=["--hold"])
    settings = Launch(nnodes=2, nproc_per_node=1, max_restarts=3, slurm=held)
    failures: list[Exception] = []

    def run() -> None:
        try:
            launch("tests.rank_program", told(tmp_path, "well"), tmp_path / "my job", "slurm", settings)
        except PreemptedError as error:
            failures.append(error)

    waiting = threading.Thread(target=run)
    waiting.start()
    job = job_of(tmp_path / "my job")
    until(lambda: field(cluster, job, "JobState") == "PENDING")
    cluster.run("scancel", job)
    waiting.join(PATIENCE)
    (error,) = failures
    assert str(error).startswith(f"SLURM job {job} was cancelled")
    assert (tmp_path / "my job" / "slurm.id").read_text() == job


def test_what_a_job_was_given_is_not_given_on(cluster: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker within an allocation queues trainings, which get what they ask for."""
    for name, value in {"SLURM_MEM_PER_NODE": "100", "SLURM_NTASKS": "7", "SLURM_JOB_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    setup = [f'echo "mem=$SLURM_MEM_PER_NODE tasks=$SLURM_NTASKS" > {tmp_path}/given.txt']
    settings = Launch(nnodes=2, nproc_per_node=1, slurm=SlurmSettings(setup=setup))
    launch("tests.rank_program", told(tmp_path, "well"), tmp_path / "my job", "slurm", settings)
    assert (tmp_path / "given.txt").read_text() == "mem= tasks=2\n"


def test_a_cancelled_job_stays_cancelled(cluster: Slurm, tmp_path: Path) -> None:
    settings = Launch(nnodes=2, nproc_per_node=1, slurm=SlurmSettings(wait=False))
    launch("tests.rank_program", told(tmp_path, "late"), tmp_path / "my job", "slurm", settings)
    job = job_of(tmp_path / "my job")
    until((tmp_path / "ranks" / "rank-1.txt").exists)
    cluster.run("scancel", job)
    until(lambda: field(cluster, job, "JobState") == "CANCELLED")
    time.sleep(8)  # longer than a requeued job waits here
    assert field(cluster, job, "Restarts") == "0"


@pytest.mark.slow
def test_a_job_is_queued_again_before_its_time_is_up(cluster: Slurm, tmp_path: Path) -> None:
    """Also, the same command finds the job that was queued before instead of queueing another."""
    settings = Launch(nnodes=2, nproc_per_node=1, slurm=SlurmSettings(time="2", signal_before_s=100))
    launch(
        "tests.rank_program",
        same := told(tmp_path, "late once"),
        tmp_path / "my job",
        "slurm",
        settings.model_copy(update={"slurm": settings.slurm.model_copy(update={"wait": False})}),
    )
    job = job_of(tmp_path / "my job")
    with pytest.raises(UserError, match=f"SLURM job {job} has other settings; scancel it"):
        launch("tests.rank_program", Told(folder=str(tmp_path)), tmp_path / "my job", "slurm", settings)
    launch("tests.rank_program", same, tmp_path / "my job", "slurm", settings)
    assert job_of(tmp_path / "my job") == job
    assert field(cluster, job, "Restarts") == "1"
    assert field(cluster, job, "JobState") == "COMPLETED"
