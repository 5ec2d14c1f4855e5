"""Artifacts: committed or absent, found again, checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.artifacts.artifact import ArtifactSpec, find, get_or_create, open_artifact, verify
from infra.artifacts.manifest import ArtifactRef
from infra.errors import UserError
from infra.hashing import hash_json
from infra.storage import filesystem

ROOT = Path(__file__).parents[1]
PLAN = ArtifactSpec("report", "test", 1, {"b": 1, "a": [1.5, None]}, {"x": ArtifactRef(id="1", url="here")})


def write(directory: Path) -> dict[str, int]:
    (directory / "part").mkdir(exist_ok=True)
    (directory / "part" / "data.bin").write_bytes(b"content")
    return {"count": 1}


def test_a_finished_artifact_is_found_and_not_made_again(tmp_path: Path) -> None:
    out = f"{tmp_path}/{{id}}"
    first = get_or_create(PLAN, out, write)
    again = get_or_create(PLAN, out, lambda _: pytest.fail("made again"))
    assert again.manifest == first.manifest
    assert Path(first.url).name == PLAN.id[:12]
    assert first.metrics == {"count": 1}


def test_an_attempt_that_failed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    def fail(directory: Path) -> dict[str, int]:
        (directory / "data.bin").write_bytes(b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        get_or_create(PLAN, str(tmp_path / "a"), fail)
    assert find(str(tmp_path / "a")) is None
    made = get_or_create(PLAN, str(tmp_path / "a"), write)
    assert [file.path for file in made.manifest.files] == ["part/data.bin"]


def test_resumable_work_survives_and_other_work_does_not(tmp_path: Path) -> None:
    def start(directory: Path) -> dict[str, int]:
        (directory / "state").write_text("half way")
        raise RuntimeError

    def go_on(directory: Path) -> dict[str, int]:
        assert (directory / "state").read_text() == "half way"
        return {}

    with pytest.raises(RuntimeError):
        get_or_create(PLAN, str(tmp_path / "a"), start)
    get_or_create(PLAN, str(tmp_path / "a"), go_on, ["state"])


def test_a_folder_that_is_not_ours_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("keep me")
    with pytest.raises(UserError, match="not written by Fovea"):
        get_or_create(PLAN, str(tmp_path), write)
    with pytest.raises(UserError, match="not written by Fovea"):
        get_or_create(PLAN, str(tmp_path), write, ["state"])
    assert (tmp_path / "holiday.txt").read_text() == "keep me"


def test_another_artifact_in_the_place_is_refused(tmp_path: Path) -> None:
    get_or_create(PLAN, str(tmp_path / "a"), write)
    other = ArtifactSpec("report", "test", 2, PLAN.settings, PLAN.inputs)
    with pytest.raises(UserError, match=r"holds an artifact of other settings \(made by another version"):
        get_or_create(other, str(tmp_path / "a"), write)


def test_the_id_depends_on_what_decides_the_result_and_on_nothing_else() -> None:
    same = ArtifactSpec("report", "test", 1, {"a": [1.5, None], "b": 1}, {"x": ArtifactRef(id="1", url="elsewhere")})
    assert same.id == PLAN.id
    for other in (
        ArtifactSpec("selection", "test", 1, PLAN.settings, PLAN.inputs),
        ArtifactSpec("report", "other", 1, PLAN.settings, PLAN.inputs),
        ArtifactSpec("report", "test", 2, PLAN.settings, PLAN.inputs),
        ArtifactSpec("report", "test", 1, {"b": 2, "a": [1.5, None]}, PLAN.inputs),
        ArtifactSpec("report", "test", 1, PLAN.settings, {"x": ArtifactRef(id="2", url="here")}),
    ):
        assert other.id != PLAN.id


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_equal_settings_have_equal_hashes(value: object) -> None:
    assert hash_json(value) == hash_json(json.loads(json.dumps(value)))


def test_damage_is_noticed(tmp_path: Path) -> None:
    artifact = get_or_create(PLAN, str(tmp_path / "a"), write)
    assert verify(artifact) == []
    (tmp_path / "a" / "part" / "data.bin").write_bytes(b"CONTENT")
    assert verify(artifact) == ["part/data.bin"]
    with pytest.raises(UserError, match="damaged"):
        artifact.local_file("part/data.bin")


def test_remote_artifacts_are_staged_and_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_CACHE", str(tmp_path))
    artifact = get_or_create(PLAN, "memory://bucket/run/{id}", write)
    assert open_artifact(artifact.url, "report").manifest == artifact.manifest
    assert artifact.local_file("part/data.bin").read_bytes() == b"content"
    assert not (tmp_path / "work").exists() or not any((tmp_path / "work").iterdir())


def test_the_wrong_kind_and_the_wrong_place_are_named(tmp_path: Path) -> None:
    url = get_or_create(PLAN, str(tmp_path / "a"), write).url
    with pytest.raises(UserError, match="is of kind report, not corpus"):
        open_artifact(url, "corpus")
    with pytest.raises(UserError, match="no corpus here"):
        open_artifact(str(tmp_path / "b"), "corpus")


def test_a_write_cut_short_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    filesystem.write_atomic(str(target), b"old")
    script = (
        "import os, signal; from infra.storage import filesystem\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"filesystem.write_atomic({str(target)!r}, b'new' * 1000)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert target.read_bytes() == b"old"


def test_two_processes_cannot_make_one_artifact_at_once(tmp_path: Path) -> None:
    def nested(directory: Path) -> dict[str, int]:
        script = (
            "from tests.test_infra_artifacts import PLAN; from infra.artifacts.artifact import get_or_create\n"
            f"get_or_create(PLAN, {str(tmp_path / 'a')!r}, print)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
        assert "another process" in done.stderr
        return write(directory)

    get_or_create(PLAN, str(tmp_path / "a"), nested)
