"""Launching: the same ranks under every launcher, their logs, how they end, and that they end with who started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from infra.errors import PreemptedError, RankDiedError, UserError
from infra.launch import slurm
from infra.launch.callback import LaunchCallback
from infra.launch.config import Launch, Launcher, Slurm
from infra.launch.launcher import launch
from tests.daemons import free_ports
from tests.rank_program import Told

pytestmark = pytest.mark.multiprocess

PROGRAM = "tests.rank_program"
TWO = Launch(nproc_per_node=2)
ALL: tuple[Launcher, ...] = ("local", "torchrun", "deepspeed")


def told(tmp_path: Path, end: str, attempts: int = 1) -> Told:
    (tmp_path / "ranks").mkdir(parents=True, exist_ok=True)
    return Told(folder=str(tmp_path / "ranks"), end=end, attempts=attempts)


def ranks(tmp_path: Path) -> dict[str, list[str]]:
    return {path.stem: path.read_text().split() for path in sorted((tmp_path / "ranks").glob("rank-*.txt"))}


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_each_launcher_starts_the_ranks_and_shows_their_logs(
    launcher: Launcher, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launch(PROGRAM, told(tmp_path, "well"), tmp_path / "job", launcher, TWO)
    found = ranks(tmp_path)
    assert [rank[:3] for rank in found.values()] == [["0", "2", "0"], ["1", "2", "1"]]
    assert found["rank-0"][3:5] == found["rank-1"][3:5]  # where they meet
    shown = capfd.readouterr().err.splitlines()
    assert "rank 0 was here" in shown
    assert "[rank-00001] rank 1 was here" in shown


def test_a_hostfile_names_the_machines(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    settings = Launch(hostfile=str(tmp_path / "hosts"), rdzv_endpoint=f"localhost:{free_ports(1)[0]}")
    launch(PROGRAM, told(tmp_path, "well"), tmp_path / "job", "deepspeed", settings)
    assert len(ranks(tmp_path)) == 2
    with pytest.raises(UserError, match="no such file; write a line HOST slots=N"):
        launch(PROGRAM, told(tmp_path, "well"), tmp_path / "job", "deepspeed", Launch(hostfile="nowhere"))


@pytest.mark.parametrize("launcher", ALL)
@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        ("mistake", UserError, "corpora: nothing here; fix the path"),
        ("preempted", PreemptedError, "stopped after step 7, as asked"),
        ("crash", ChildProcessError, "ended with exit code 1"),
    ],
)
def test_how_ranks_end_is_told_under_every_launcher(
    launcher: Launcher, end: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    settings = told(tmp_path, end).model_copy(update={"attempts": 2})
    with pytest.raises(error, match=message):
        launch(PROGRAM, settings, tmp_path / "job", launcher, Launch(nproc_per_node=1))


def started(tmp_path: Path, launcher: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process that launches two ranks which take their time, and the ranks' ids."""
    config = told(tmp_path, "late").model_dump_json()
    code = (
        "from pathlib import Path; from infra.launch.config import Launch; from infra.launch.launcher import launch\n"
        "from infra.errors import PreemptedError; from tests.rank_program import Told\n"
        f"try: launch({PROGRAM!r}, Told.model_validate_json({config!r}), Path({str(tmp_path / 'job')!r}),"
        f" {launcher!r}, Launch(nproc_per_node=2))\n"
        "except PreemptedError as error: print(error)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    count, deadline = 1 if launcher == "local" else 2, time.monotonic() + 60
    while len(found := ranks(tmp_path)) < count or not all(found.values()):
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    return parent, [int(rank[-1].removeprefix("pid=")) for rank in found.values()]


@pytest.mark.parametrize(
    ("launcher", "number"), [(each, signal.SIGTERM) for each in ALL] + [("torchrun", signal.SIGUSR1)]
)
def test_who_is_asked_to_stop_asks_every_rank(launcher: str, number: signal.Signals, tmp_path: Path) -> None:
    parent, _ = started(tmp_path, launcher)
    parent.send_signal(number)
    said, _ = parent.communicate(timeout=20)  # the ranks would take longer by themselves
    assert "stopped outside a training, as asked; run again to resume" in said


def test_a_request_before_the_ranks_listen_is_not_lost(tmp_path: Path) -> None:
    """Nor does it kill them: they are deaf to it until they can answer."""
    config = told(tmp_path, "late").model_dump_json()
    code = (
        "import os, signal, threading; from pathlib import Path; from infra.launch.config import Launch\n"
        "from infra.launch.launcher import launch; from infra.errors import PreemptedError\n"
        "from tests.rank_program import Told\n"
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        f"try: launch({PROGRAM!r}, Told.model_validate_json({config!r}), Path({str(tmp_path / 'job')!r}),"
        " 'torchrun', Launch(nproc_per_node=2))\n"
        "except PreemptedError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "stopped outside a training, as asked" in done.stdout


@pytest.mark.parametrize(
    ("launcher", "settings", "name"),
    [
        ("torchrun", Launch(hostfile="hosts"), "hostfile"),
        ("slurm", Launch(rdzv_endpoint="here:1"), "rdzv_endpoint"),
        ("torchrun", Launch(slurm=Slurm(partition="long")), "slurm"),
    ],
)
def test_settings_that_a_launcher_does_not_read_are_refused(
    launcher: Launcher, settings: Launch, name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"launch.{name}: not read by --launcher {launcher}"):
        launch(PROGRAM, told(tmp_path, "well"), tmp_path / "job", launcher, settings)


@pytest.mark.parametrize("launcher", ALL)
def test_ranks_end_with_who_started_them(launcher: str, tmp_path: Path) -> None:
    parent, pids = started(tmp_path, launcher)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 15
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_several_machines_need_a_place_to_meet(tmp_path: Path) -> None:
    for launcher, missing in (("torchrun", "launch.rdzv_endpoint"), ("deepspeed", "launch.hostfile")):
        with pytest.raises(UserError, match=missing):
            launch(PROGRAM, told(tmp_path, "well"), tmp_path / "job", launcher, Launch(nnodes=2, nproc_per_node=1))  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="HOST:PORT"):
        Launch(rdzv_endpoint="somewhere")


def test_what_sbatch_is_told(tmp_path: Path) -> None:
    asked = Slurm(gpus_per_node=8, time="1-00:00:00", sbatch_args=["--exclude=n3"], setup=["module load x"])
    lines = slurm.script("pretrain", tmp_path / "my job", Launch(nnodes=4, slurm=asked)).splitlines()
    assert lines[0] == "#!/bin/bash"
    options = {"nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "time": "1-00:00:00", "signal": "USR1@180"}
    assert {f'#SBATCH --{name}="{value}"' for name, value in options.items()} < set(lines)
    assert {"#SBATCH --exclude=n3", "#SBATCH --requeue"} < set(lines)
    assert lines.index("module load x") < next(i for i, line in enumerate(lines) if line.startswith("srun "))
    chained = slurm.script("pretrain", tmp_path, Launch(slurm=Slurm(array_jobs=5)))
    assert '--array="1-5%1"' in chained
    assert "scontrol requeue" not in chained


def test_slurm_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch: not found; run this where SLURM's commands are"):
        launch(PROGRAM, told(tmp_path, "well"), tmp_path / "job", "slurm", Launch())


def test_ranks_know_themselves_under_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "20042"}
    for name in wanted:
        monkeypatch.delenv(name, raising=False)
    srun = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "10042"}
    srun["SLURM_STEP_ID"] = "0"
    for name, value in (srun | {"MASTER_ADDR": "10.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what is adopted ends with the test
    slurm.adopt_environment()
    assert {name: os.environ[name] for name in wanted} == wanted | {"MASTER_PORT": str(20_000 + 10_042 % 10_000)}


class Heard(LaunchCallback):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_message(self, message: str) -> None:
        self.lines.append(message)


@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_ranks_that_died_are_started_again_and_those_that_gave_a_reason_are_not(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.launch.launcher._FIRST_PAUSE_SECONDS", 0.1)
    heard, settings = Heard(), Launch(nproc_per_node=1, max_restarts=2)
    launch(PROGRAM, told(tmp_path, "killed", attempts=3), tmp_path / "job", launcher, settings, heard)
    assert len((tmp_path / "ranks" / "rank-0.txt").read_text().splitlines()) == 3
    assert [line.partition("; ")[2] for line in heard.lines] == [
        f"started again, {number} of at most 2 times" for number in (1, 2)
    ]
    with pytest.raises(RankDiedError, match="ended with exit code"):
        launch(PROGRAM, told(tmp_path / "a", "killed", attempts=9), tmp_path / "job", launcher, settings, heard)
    assert len((tmp_path / "a" / "ranks" / "rank-0.txt").read_text().splitlines()) == 3
    with pytest.raises(UserError, match="nothing here"):
        launch(PROGRAM, told(tmp_path / "b", "mistake"), tmp_path / "job", launcher, settings, heard)
    assert len((tmp_path / "b" / "ranks" / "rank-0.txt").read_text().splitlines()) == 1


def test_who_is_asked_to_stop_starts_no_rank_again(tmp_path: Path) -> None:
    """Also where the ranks die of being asked, and between two attempts."""
    settings = Launch(nproc_per_node=1, max_restarts=5).model_dump_json()
    script = (
        "from pathlib import Path; from infra.launch.config import Launch; from infra.launch import launcher\n"
        "from infra.errors import PreemptedError; from tests.rank_program import Told\n"
        "launcher._FIRST_PAUSE_SECONDS = 60.0\n"
        f"told = Told.model_validate_json({told(tmp_path, 'killed', attempts=9).model_dump_json()!r})\n"
        f"settings = Launch.model_validate_json({settings!r})\n"
        f"try: launcher.launch({PROGRAM!r}, told, Path({str(tmp_path / 'job')!r}), 'local', settings)\n"
        "except PreemptedError as error: print(error)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "started again" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.read().startswith("stopped between two attempts")
    assert process.wait(30) == 0
    assert len((tmp_path / "ranks" / "rank-0.txt").read_text().splitlines()) == 1
