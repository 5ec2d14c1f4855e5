"""`fovea doctor` tells what is wrong, each with a remedy, and what is right."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from flows import doctor as page
from flows.cli.main import main
from infra.doctor import machine
from infra.doctor.finding import Finding, guarded, ok
from pretrain import doctor


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {each.name: each for each in found}


def test_here_all_that_is_installed_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind in the storage."""
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_name(
        [*machine.packages(), *machine.hardware(), *machine.reached(str(tmp_path / "bucket")), machine.slurm()]
    )
    assert {each.status for each in found.values()} <= {"ok", "warn"}
    assert {name: found[name].status for name in ("requirements", "storage", "clock", "slurm")} == dict.fromkeys(
        ("requirements", "storage", "clock", "slurm"), "ok"
    )
    assert not list((tmp_path / "bucket").iterdir())
    assert "no SLURM here" in found["slurm"].message
    assert page._faiss().status == "ok"
    kernels = by_name(list(doctor.kernels()))
    assert kernels["attention sdpa"].status == "ok"
    assert kernels["messages"].status == "ok"


def test_what_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["numpy>=99", "not-there>=1", "pytest>=1", "windows-only>=1; sys_platform == 'win32'", "x>=1; extra == 'y'"]
    monkeypatch.setattr("infra.doctor.machine.metadata.requires", lambda _: asked)
    found = by_name(list(machine.packages()))["requirements"]
    assert found.status == "fail"
    assert found.message.startswith("not-there>=1 is asked for, none is there; numpy>=99 is asked for")
    assert "pytest" not in found.message
    assert found.remedy


def test_a_full_disk_warns_and_one_that_cannot_be_written_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1e9, 1e9, 1e6))
    assert machine._room("disk here", lambda: tmp_path).status == "warn"
    (tmp_path / "file").write_text("")
    found = guarded(
        "cache", lambda: machine._room("cache", lambda: tmp_path / "file" / "folder"), "choose another folder"
    )
    assert (found.status, found.remedy) == ("fail", "choose another folder")


def test_a_storage_that_is_not_there_fails_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ENDPOINT_URL", "http://127.0.0.1:9"), ("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "y")):
        monkeypatch.setenv(f"AWS_{name}", value)
    found = by_name(list(machine.reached("s3://bucket/folder")))
    assert found["storage"].status == "fail"
    assert "\n" not in found["storage"].message
    assert "credentials" in found["storage"].remedy


@pytest.mark.parametrize(
    ("script", "status", "told"),
    [
        ("echo 'gpu* 4 idle'; echo 'gpu* 1 down'", "ok", "4 nodes idle in gpu*, 1 nodes down in gpu*"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "fail", "Unable to contact slurm controller"),
        ("echo 'Could not establish a configuration source' >&2; exit 1", "ok", "no cluster is configured here"),
    ],
)
def test_slurm_is_asked(script: str, status: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "sinfo"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine.slurm()
    assert found.status == status
    assert told in found.message


def test_a_check_that_raises_has_failed() -> None:
    def broken() -> Finding:
        raise ImportError("libcuda.so.1: cannot open\nand more")

    assert guarded("faiss", broken, "install it") == Finding("faiss", "fail", "libcuda.so.1: cannot open", "install it")
    assert guarded("faiss", lambda: ok("faiss", "fine"), "") == ok("faiss", "fine")


def test_the_command_prints_json_and_fails_where_something_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [ok("gpu 0", "there"), Finding("storage", "fail", "gone [bold]", "fix it")]
    monkeypatch.setattr(page, "findings", lambda _: iter(found))
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert ended.value.code == 1
    assert [each["status"] for each in json.loads(capsys.readouterr().out)] == ["ok", "fail"]
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert "gone [bold]" in capsys.readouterr().out
