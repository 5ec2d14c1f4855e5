"""Artifacts: what one stage hands to the next. A directory whose `manifest.json`, written last, commits it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from infra.artifacts import staging
from infra.artifacts.lease import Lease, hold_lease
from infra.artifacts.manifest import ArtifactRef, FileEntry, Kind, Manifest
from infra.artifacts.staging import MANIFEST, WorkRecord
from infra.errors import UserError
from infra.hashing import hash_file, hash_json, hash_url
from infra.notices import print_notice
from infra.storage import filesystem

SHORT_ID = 12  # characters of an id that stand in a path


@dataclass(frozen=True)
class Artifact:
    """A committed artifact at a URL."""

    url: str
    manifest: Manifest

    @property
    def id(self) -> str:
        return self.manifest.id

    def has_stage_version(self, version: int) -> bool:
        """Whether its stage had this version."""
        made = self.manifest
        return ArtifactSpec(made.kind, made.stage, version, made.config, made.inputs).id == self.id

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest.metrics

    def as_ref(self) -> ArtifactRef:
        return ArtifactRef(id=self.id, url=self.url)

    def url_of(self, path: str) -> str:
        return filesystem.join(self.url, path)

    def read_json(self, path: str) -> Any:
        return json.loads(self.read_bytes(path))

    def read_bytes(self, path: str) -> bytes:
        """The content of one of the artifact's files, checked against the manifest.

        Raises:
            UserError: the content is not what the stage wrote.
        """
        data = filesystem.read_bytes(self.url_of(path))
        entry = next((file for file in self.manifest.files if file.path == path), None)
        if entry is not None and hashlib.sha256(data).hexdigest() != entry.sha256:
            raise UserError(f"{self.url_of(path)}: damaged; remove {self.url} and run its stage again")
        return data

    def local_file(self, path: str) -> Path:
        """A local copy of one file, with its hash checked; the file itself where the artifact is local."""
        entry = next((file for file in self.manifest.files if file.path == path), None)
        if entry is None:
            raise UserError(f"{self.url}: has no file {path}; is it the artifact you meant?")
        local = filesystem.local_path(self.url_of(path))
        if not filesystem.is_local(self.url):
            local = cache_directory() / "files" / entry.sha256 / Path(path).name
            if not local.exists():
                local.parent.mkdir(parents=True, exist_ok=True)
                partial = local.with_name(f"{local.name}.{os.getpid()}.part")
                filesystem.download(self.url_of(path), partial)
                if hash_file(partial) == entry.sha256:
                    partial.replace(local)
        if not local.is_file() or local.stat().st_size != entry.bytes or hash_file(local) != entry.sha256:
            raise UserError(f"{self.url_of(path)}: damaged; remove {self.url} and run its stage again")
        return local


@dataclass(frozen=True)
class ArtifactSpec:
    """What is about to be made: everything that decides an artifact's id.

    `version` is the stage's own: it is raised when the stage's output would change for the same inputs.
    """

    kind: Kind
    stage: str
    version: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, ArtifactRef] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """SHA-256 over kind, stage, version, settings and the ids (not the URLs) of the inputs."""
        return hash_json(
            {
                "kind": self.kind,
                "stage": self.stage,
                "version": self.version,
                "config": self.settings,
                "inputs": {name: each.id for name, each in self.inputs.items()},
            }
        )

    def record(self, resume_from: Sequence[str] = ()) -> WorkRecord:
        """What a staging directory is recorded to hold while the artifact is made."""
        return WorkRecord(
            id=self.id,
            stage=self.stage,
            version=self.version,
            config=json.loads(json.dumps(dict(self.settings))),
            inputs={name: each.id for name, each in self.inputs.items()},
            resume_from=list(resume_from),
        )

    def resolve(self, out: str) -> str:
        """The URL to write to: `{id}` in `out` stands for the first characters of the id."""
        return out.replace("{id}", self.id[:SHORT_ID])


def cache_directory() -> Path:
    """Where work is staged and what can be had again is kept: `$FOVEA_CACHE`, or `~/.cache/fovea`.

    Raises:
        UserError: nothing can be written there.
    """
    path = Path(os.environ.get("FOVEA_CACHE") or Path.home() / ".cache" / "fovea")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; set FOVEA_CACHE to a folder that can be written") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{path}: not writable; set FOVEA_CACHE to a folder that is")
    return path


def find(url: str) -> Artifact | None:
    """The artifact at a URL, or None where no manifest commits one."""
    location = filesystem.join(url, MANIFEST)
    if not filesystem.exists(location):
        return None
    try:
        return Artifact(url, Manifest.model_validate_json(filesystem.read_bytes(location)))
    except ValidationError:
        raise UserError(f"{location}: not a manifest this version of Fovea can read; remove it or upgrade") from None


def open_artifact(url: str, *kinds: Kind) -> Artifact:
    """The artifact of one of some kinds at a URL.

    Raises:
        UserError: none is there, or it is of another kind.
    """
    artifact, wanted = find(url), " or ".join(kinds)
    if artifact is None:
        raise UserError(f"{url}: no {wanted} here (no {MANIFEST}); run the stage that makes it, or fix the path")
    if artifact.manifest.kind not in kinds:
        raise UserError(
            f"{url}: is of kind {artifact.manifest.kind}, not {wanted}; give the URL of an artifact of kind {wanted}"
        )
    return artifact


def open_ref(ref: ArtifactRef, *kinds: Kind) -> Artifact:
    """What an artifact was made from, if it is still where it was.

    Raises:
        UserError: nothing is there any more, or something else.
    """
    artifact = open_artifact(ref.url, *kinds)
    if artifact.id != ref.id:
        raise UserError(f"{ref.url}: holds another {kinds[0]} than the one used before; restore it")
    return artifact


def verify(artifact: Artifact) -> list[str]:
    """Read every file of an artifact and return the paths whose size or hash is wrong."""
    return [
        file.path
        for file in artifact.manifest.files
        if not filesystem.exists(artifact.url_of(file.path))
        or hash_url(artifact.url_of(file.path)) != (file.bytes, file.sha256)
    ]


def get_or_create(
    spec: ArtifactSpec,
    out: str,
    write: Callable[[Path], Mapping[str, Any]],
    resume_from: Sequence[str] = (),
    restart: bool = False,
) -> Artifact:
    """Return the planned artifact, making it only if it does not exist yet.

    Args:
        plan: what decides the artifact's id.
        out: the URL to write to; may hold `{id}`.
        write: fills a local directory and returns the artifact's metrics. What it leaves there under a name that begins
            with a dot is not part of the artifact.
        resume_from: glob patterns, relative to the directory, of files that `write` resumes from. With any, it gets the
            directory as an interrupted attempt left it, and such files are never removed because a setting changed.
        restart: discard unfinished work of other settings.

    Raises:
        UserError: the URL holds an artifact made from other inputs or settings, or unfinished work of such a one.
        ArtifactLockedError: another process is making it.
    """
    url = spec.resolve(out)
    existing = find_existing(spec, out)
    if existing is not None:
        return existing
    work, record = staging_dir(spec, out), spec.record(resume_from)
    with staging.hold_staging(work, record, restart), _hold_remote_lease(url, work) as lease:
        existing = find(url)  # another process may have finished it between the first look and the lock
        if existing is not None and existing.id == spec.id:
            (work / staging.RECORD).unlink(missing_ok=True)
            return existing
        if resume_from and not filesystem.is_local(url):
            staging.stage_remotely(url, record, restart)
        if not resume_from:
            staging.discard(work)
        elif (newest := staging.find_newest_resumable(url, resume_from)) is not None:
            print_notice(f"{spec.stage}: resuming from {newest}")
        metrics = write(work)
        artifact = _commit(spec, url, work, metrics, lease)
        staging.discard_hidden(work)
    if not filesystem.is_local(url):
        shutil.rmtree(work)
        if resume_from:
            filesystem.remove(filesystem.join(url, staging.RECORD))
    return artifact


def find_existing(spec: ArtifactSpec, out: str) -> Artifact | None:
    """The planned artifact, if it has been made.

    Raises:
        UserError: the URL holds an artifact made from other inputs or settings.
    """
    url = spec.resolve(out)
    existing = find(url)
    if existing is not None and existing.id != spec.id:
        made = existing.manifest
        recorded = ArtifactSpec(made.kind, made.stage, spec.version, made.config, made.inputs).record()
        difference = staging.describe_difference(recorded, spec.record())
        raise UserError(f"{url}: holds an artifact of other settings ({difference}); remove it or choose another --out")
    return existing


def staging_dir(spec: ArtifactSpec, out: str) -> Path:
    """The local directory in which an artifact is made: its own place, or a staging one where that is remote."""
    url = spec.resolve(out)
    return filesystem.local_path(url) if filesystem.is_local(url) else cache_directory() / "work" / spec.id


def _hold_remote_lease(url: str, work: Path) -> contextlib.AbstractContextManager[Lease | None]:
    return contextlib.nullcontext() if filesystem.is_local(url) else hold_lease(url, work)


def _commit(spec: ArtifactSpec, url: str, work: Path, metrics: Mapping[str, Any], lease: Lease | None) -> Artifact:
    hidden = [path for path in work.iterdir() if path.name.startswith(".")]  # what only the making needed
    paths = sorted(
        path for path in work.rglob("*") if path.is_file() and not any(path.is_relative_to(each) for each in hidden)
    )
    files = [
        FileEntry(path=path.relative_to(work).as_posix(), bytes=path.stat().st_size, sha256=hash_file(path))
        for path in paths
    ]
    manifest = Manifest(
        kind=spec.kind,
        id=spec.id,
        stage=spec.stage,
        inputs=dict(spec.inputs),
        config=dict(spec.settings),
        files=files,
        metrics=dict(metrics),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    for path, file in zip(paths, files, strict=True):
        if filesystem.is_local(url):
            path.chmod(work.stat().st_mode & 0o666)  # safetensors lets only the owner read what it writes
            fsync_path(path)
        else:
            filesystem.upload(path, filesystem.join(url, file.path))
    if lease is not None:
        lease.require()
    filesystem.write_atomic(filesystem.join(url, MANIFEST), manifest.model_dump_json(indent=2, by_alias=True).encode())
    return Artifact(url, manifest)


def fsync_path(path: Path) -> None:
    """Bring a file or folder to the disk, so that nothing outlives in a power cut what it stands on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
