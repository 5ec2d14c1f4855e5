"""Staging directories: where an artifact is made before its manifest commits it, locked and recorded."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from pydantic import Field, ValidationError

from infra.artifacts import lease
from infra.config import Config
from infra.errors import ArtifactLockedError, UserError
from infra.notices import print_notice
from infra.storage import filesystem

MANIFEST = "manifest.json"
RECORD = ".incomplete"
_LOCK_SECONDS = 10
_MOST_DIFFERENCES = 4  # named in a message


class WorkRecord(Config):
    """Which artifact the files of a staging directory belong to."""

    id: str
    stage: str
    version: int
    config: dict[str, Any]
    inputs: dict[str, str]
    """Ids of the inputs by role."""
    resume_from: list[str] = Field(default_factory=list)
    """Glob patterns, relative to the directory, of the files that an interrupted stage resumes from."""


def describe_difference(before: WorkRecord, after: WorkRecord) -> str:
    """Name what distinguishes two artifacts: stage, settings, inputs or the version of Fovea."""
    if before.stage != after.stage:
        return f"stage {before.stage}, now {after.stage}"
    old, new = _flat(before.config), _flat(after.config)
    named = [
        f"{key} {_shown(old.get(key))}, now {_shown(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    roles = sorted(before.inputs.keys() | after.inputs.keys())
    named += [f"another {role}" for role in roles if before.inputs.get(role) != after.inputs.get(role)]
    if not named:
        return "made by another version of Fovea"
    more = len(named) - _MOST_DIFFERENCES
    return "; ".join(named[:_MOST_DIFFERENCES]) + (f"; {more} more" if more > 0 else "")


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and sequences by their dotted keys."""
    if isinstance(value, Mapping) and value:
        pairs = [(str(name), each) for name, each in value.items()]
    elif isinstance(value, list) and any(isinstance(each, Mapping | list) for each in value):
        pairs = [(str(number), each) for number, each in enumerate(value)]
    else:
        return {key: value}
    leaves: dict[str, Any] = {}
    for name, each in pairs:
        leaves |= _flat(each, f"{key}.{name}" if key else name)
    return leaves


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@contextlib.contextmanager
def hold_staging(work: Path, record: WorkRecord, restart: bool = False) -> Iterator[None]:
    """Hold a staging directory: locked against other processes for as long as this one lives.

    Args:
        record: the artifact that is about to be made there.
        restart: discard unfinished work of other settings.

    Raises:
        UserError: the directory holds files that Fovea did not write, or unfinished work of other settings.
        ArtifactLockedError: another process is making an artifact there.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{work}: {error.strerror}; choose another --out") from None
    if any(work.iterdir()) and not (work / RECORD).exists() and not (work / MANIFEST).exists():
        raise UserError(f"{work}: not empty and not written by Fovea; choose another --out")
    with (work / RECORD).open("a+") as mark:
        _lock(mark, work)
        mark.seek(0)
        content = mark.read()
        if content != _encoded(record) and not (work / MANIFEST).exists():
            before = _decoded(content)
            if before is None or before.id != record.id:
                require_same_work(str(work), before, record, _files(work), restart)
                mark.truncate(0)  # first: half-discarded work belongs to no artifact
                mark.flush()
                discard(work)
            mark.truncate(0)
            mark.write(_encoded(record))
            mark.flush()
        yield


def _encoded(record: WorkRecord) -> str:
    return record.model_dump_json()


def _decoded(content: str) -> WorkRecord | None:
    """The record in a file's content; None where a kill cut it short or its work was being discarded."""
    try:
        return WorkRecord.model_validate_json(content)
    except ValidationError:
        return None


def _files(work: Path) -> list[str]:
    return [path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file()]


def require_same_work(
    place: str, before: WorkRecord | None, record: WorkRecord, files: list[str], restart: bool
) -> None:
    """Check that no work is lost if an artifact is made in a place.

    Args:
        before: what the place was recorded to hold.
        record: the artifact that is about to be made.
        files: paths of all files there, relative to the place.

    Raises:
        UserError: the place holds files that an interrupted stage of other settings resumes from.
    """
    if restart or before is None or before.id == record.id:
        return
    if any(fnmatch(path, pattern) for path in files for pattern in before.resume_from):
        raise UserError(
            f"{place}: holds unfinished work of other settings ({describe_difference(before, record)}); use those "
            "settings to resume it, choose another --out, or discard it with --restart"
        )


def read_record(url: str) -> WorkRecord | None:
    """What an unfinished place is recorded to hold; None where nothing is, or a manifest commits it."""
    place = filesystem.join(url, RECORD)
    if not filesystem.exists(place) or filesystem.exists(filesystem.join(url, MANIFEST)):
        return None
    return _decoded(filesystem.read_bytes(place).decode())


def check_unfinished(url: str, record: WorkRecord, restart: bool = False) -> WorkRecord | None:
    """Check, without holding it, that a place can be worked in; return what it is recorded to hold.

    Raises:
        UserError: it holds unfinished work of other settings; see `require_same_work`.
    """
    before = read_record(url)
    if before is not None and before.id != record.id:
        require_same_work(url, before, record, list(filesystem.list_files(url)), restart)
    return before


def find_newest_resumable(url: str, resume_from: Sequence[str]) -> str | None:
    """The last of the files at a URL that an interrupted stage resumes from, by the numbers in their paths.

    Args:
        resume_from: their glob patterns.
    """
    found = [path for path in filesystem.list_files(url) if any(fnmatch(path, pattern) for pattern in resume_from)]
    return filesystem.join(url, max(found, key=_numbered)) if found else None


def _numbered(path: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def stage_remotely(url: str, record: WorkRecord, restart: bool) -> None:
    """Record at a remote URL which artifact is being made there: states of a training lie there before the manifest.

    Raises:
        UserError: the URL holds unfinished work of other settings.
    """
    before = check_unfinished(url, record, restart)
    if before is not None and before.id != record.id:
        for path in filesystem.list_files(url):
            if not path.startswith(f"{lease.FOLDER}/") and path != RECORD:
                filesystem.remove(filesystem.join(url, path))
    filesystem.write_atomic(filesystem.join(url, RECORD), _encoded(record).encode())


def require_unlocked(work: Path) -> None:
    """Check that no other process is making an artifact in a local directory.

    Raises:
        ArtifactLockedError: one is.
    """
    if (work / RECORD).exists():
        with (work / RECORD).open("a") as mark:
            _lock(mark, work)


def _lock(mark: IO[str], work: Path) -> None:
    """Lock a directory's record; loader processes of a killed training may hold it for some seconds more.

    The lock is on the record itself, so that a process which holds it owns what it reads there. A lock file beside it,
    as the package filelock makes, could be removed while another process waits for it.
    """
    for attempt in range(_LOCK_SECONDS):
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if attempt == 0:
                print_notice(f"{work}: another process works there; waiting up to {_LOCK_SECONDS} s for it to end")
            if attempt + 1 < _LOCK_SECONDS:
                time.sleep(1)
    raise ArtifactLockedError(f"{work}: another process is making this artifact; wait for it or stop it")


def discard(work: Path) -> None:
    """Remove what an attempt that did not finish left behind, the record excepted."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in (RECORD, lease.OWNER):
            path.unlink()


def discard_hidden(work: Path) -> None:
    """Remove the files that only the making needed, the record last."""
    for path in work.iterdir():
        if path.name.startswith(".") and path.name != RECORD:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (work / RECORD).unlink()
