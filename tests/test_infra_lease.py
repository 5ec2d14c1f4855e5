"""Claims on remote artifacts: one process at a time, also after crashes, on a server that refuses what is there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from infra.artifacts import lease
from infra.artifacts.artifact import find, get_or_create
from infra.artifacts.lease import FOLDER, hold_lease
from infra.errors import UserError
from infra.storage import filesystem
from tests.test_infra_artifacts import PLAN, ROOT, write
from tests.test_infra_storage import bucket

__all__ = ["bucket"]


ended: list[str] = []
"""Instead of this process: what it would have said."""


@pytest.fixture
def url(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(lease, "LEASE_TIMEOUT_S", 2.0)
    monkeypatch.setattr(lease, "_end_process", ended.append)
    ended.clear()
    for folder in ("a", "b", *map(str, range(8))):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("FOVEA_CACHE", str(tmp_path / "cache"))
    return filesystem.join(bucket, tmp_path.name)


def left(url: str) -> list[str]:
    files, path = filesystem.connect(url)
    files.invalidate_cache()
    return [each.rpartition("/")[2] for each in files.find(f"{path}/{FOLDER}")]


def dead(url: str, number: int, owner: str = "elsewhere:/w") -> None:
    filesystem.write_atomic(
        filesystem.join(url, FOLDER, f"{number:06d}.json"), f'{{"owner": "{owner}", "token": "t", "beats": 4}}'.encode()
    )


def test_a_claim_is_one_processs_and_leaves_nothing(url: str, tmp_path: Path) -> None:
    with hold_lease(url, tmp_path / "a") as claim:
        claim.require()
        assert left(url) == ["000001.json"]
        with (
            pytest.raises(UserError, match=r"another process, on .*, is making this artifact"),
            hold_lease(url, tmp_path / "b"),
        ):
            pass
        claim.require()
    assert left(url) == []


def test_what_is_there_is_not_created_again(url: str) -> None:
    place = filesystem.join(url, "file")
    assert filesystem.create_exclusive(place, b"first")
    assert not filesystem.create_exclusive(place, b"second")
    assert filesystem.read_bytes(place) == b"first"


def test_a_claim_that_stands_still_is_taken_over(url: str, tmp_path: Path) -> None:
    dead(url, 3)
    begun = time.monotonic()
    with hold_lease(url, tmp_path) as claim:
        assert time.monotonic() - begun >= 2.0
        assert claim.number == 4
    assert left(url) == []


def test_a_claim_from_the_same_locked_folder_is_taken_over_at_once(url: str, tmp_path: Path) -> None:
    with hold_lease(url, tmp_path) as claim:
        owner = claim.owner
    with hold_lease(url, tmp_path / "a") as other:
        assert other.owner != owner  # another folder, though of the same name elsewhere
    dead(url, 1, owner)
    begun = time.monotonic()
    with hold_lease(url, tmp_path):
        assert time.monotonic() - begun < 1.5


def test_who_was_silent_for_too_long_does_not_commit(url: str, tmp_path: Path) -> None:
    """Also where the one who took over has ended, and where a third one goes by the same number."""

    def slow(directory: Path) -> dict[str, int]:
        filesystem.remove(filesystem.join(url, FOLDER))  # as one does who took over and ended
        return write(directory)

    with pytest.raises(UserError, match="another one has taken over"):
        get_or_create(PLAN, url, slow)
    with hold_lease(url, tmp_path / "a") as first:
        dead(url, 1)
        with pytest.raises(UserError, match="another one has taken over"):
            first.require()
        time.sleep(0.6)
        assert len(ended) == 1  # of itself, and once
    assert left(url) == ["000001.json"]  # not ours to remove
    filesystem.remove(filesystem.join(url, FOLDER))
    ended.clear()
    with hold_lease(url, tmp_path / "a") as first:
        dead(url, first.number + 1)  # whoever takes over leaves the claim of the slow one where it is
        time.sleep(0.6)
        assert len(ended) == 1
    assert left(url) == ["000002.json"]


def test_of_many_at_once_one_wins(url: str, tmp_path: Path) -> None:
    held, refused = [], []
    together = threading.Barrier(8)

    def contend(number: int) -> None:
        together.wait()
        try:
            with hold_lease(url, tmp_path / str(number)):
                held.append(number)
                time.sleep(3)
        except UserError:
            refused.append(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(held) == 1
    assert len(refused) == 7


def test_two_machines_cannot_make_one_artifact_at_once(url: str, tmp_path: Path) -> None:
    """Processes with caches of their own, as on two machines; and after the first was killed, the second can."""
    script = (
        "import sys; from tests.test_infra_artifacts import PLAN, write; from infra.artifacts import lease\n"
        "from infra.artifacts.artifact import get_or_create\n"
        "lease.HEARTBEAT_S, lease.LEASE_TIMEOUT_S = 0.2, 2.0\n"
        f"get_or_create(PLAN, {url!r}, lambda folder: print('making', flush=True) or sys.stdin.read() or write(folder))"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "FOVEA_CACHE": str(tmp_path / "other")},
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "making\n"
    with pytest.raises(UserError, match="is making this artifact"):
        get_or_create(PLAN, url, write)
    assert find(url) is None
    first.kill()
    first.wait()
    assert get_or_create(PLAN, url, write).metrics == {"count": 1}
    assert left(url) == []
