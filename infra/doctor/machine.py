"""Packages, processors, memory, disk, SLURM and clock of this machine, and a storage it reaches."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from infra.artifacts.artifact import cache_directory
from infra.doctor.finding import Finding, fail, guarded, ok, warn
from infra.storage import filesystem

_SHOWN = ("torch", "deepspeed", "prefect", "faiss-gpu", "xformers", "timm", "open_clip_torch", "s3fs", "webdataset")
_SPARE = 50  # GB that a checkpoint and its states may take
_PROBE = 16 << 20  # bytes that are written to a storage and read again
_SLOW = 20e6  # bytes a second
_SKEW = 2.0  # seconds; S3 refuses requests from 15 minutes on, and logs of several machines mix up much earlier
_SHARED_MEMORY = 1.0  # GB; loader processes hand their batches over in it


def packages() -> Iterator[Finding]:
    """Python and the packages that Fovea names, against what it asks for."""
    found = {name: _version(name) for name in _SHOWN}
    told = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    yield ok("versions", f"fovea {_version('fovea')}, Python {platform.python_version()}, {told}")
    missing = sorted(_unmet())
    if missing:
        yield fail("requirements", "; ".join(missing), "install fovea again under constraints.txt")
    else:
        yield ok("requirements", "all met")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unmet() -> Iterator[str]:
    for line in metadata.requires("fovea") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = _version(wanted.name)
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted.name}{wanted.specifier} is asked for, {version or 'none'} is there"


def hardware() -> Iterator[Finding]:
    """Cores, memory, shared memory, and room for work and caches."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 1e9
    yield ok("machine", f"{cores} cores, {memory:.0f} GB of memory, {platform.system()} {platform.machine()}")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / 1e9
        remedy = "give the container more (docker run --shm-size=8g), or set runtime.num_workers to 0"
        enough = size >= _SHARED_MEMORY
        yield ok("shared memory", f"{size:.1f} GB") if enough else warn("shared memory", f"{size:.1f} GB", remedy)
    for name, find in (("disk here", Path.cwd), ("cache", cache_directory)):
        yield guarded(name, partial(_room, name, find), "choose another folder")


def _room(name: str, find: Callable[[], Path]) -> Finding:
    folder = find()
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".fovea-doctor-{uuid.uuid4().hex}"
    probe.write_bytes(b"")
    probe.unlink()
    free = shutil.disk_usage(folder).free / 1e9
    told = f"{folder}: {free:,.0f} GB free"
    return ok(name, told) if free >= _SPARE else warn(name, told, "checkpoints of large models need more; use a bucket")


def reached(url: str) -> Iterator[Finding]:
    """Whether a storage can be written, read and listed, how fast, and how far its clock is from ours."""
    probe = filesystem.join(url, f".fovea-doctor-{uuid.uuid4().hex}")
    found = guarded("storage", lambda: _speed(url, probe), "fix the URL, the endpoint or the credentials")
    yield found
    if found.status != "fail":
        if not filesystem.is_local(url):
            yield guarded("claims", lambda: _claims(url, probe), "use another storage")
        yield guarded("clock", lambda: _skew(probe), "synchronize this machine's clock (chrony, systemd-timesyncd)")
        filesystem.remove(probe)


def _speed(url: str, probe: str) -> Finding:
    data = os.urandom(_PROBE)
    started = time.monotonic()
    filesystem.write_atomic(probe, data)
    written = time.monotonic()
    if filesystem.read_bytes(probe) != data:
        return fail("storage", f"{url}: does not give back what was written", "use another storage")
    read = time.monotonic()
    rates = _PROBE / (written - started), _PROBE / (read - written)
    told = f"{url}: {rates[0] / 1e6:,.0f} MB/s written, {rates[1] / 1e6:,.0f} MB/s read, one stream"
    return ok("storage", told) if min(rates) > _SLOW else warn("storage", told, "use a nearer one, or runtime.cache_gb")


def _claims(url: str, probe: str) -> Finding:
    """Whether it refuses to create what is there: by that two machines see that they make the same artifact."""
    if filesystem.create_exclusive(probe, b"again"):
        remedy = "let one run at a time write there"
        return warn("claims", f"{url}: a conditional write replaced what was there", remedy)
    return ok("claims", "a file that is there is not created again")


def _skew(probe: str) -> Finding:
    """By the time that the storage gives what was written just now."""
    now = datetime.now(UTC).timestamp()
    skew = filesystem.mtime(probe) - now
    late = max(abs(skew) - 5.0, 0.0)  # writing and reading took some of it
    told = f"the storage's is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}, the test included"
    return ok("clock", told) if late <= _SKEW else warn("clock", told, "synchronize this machine's clock")


def slurm() -> Finding:
    """Whether SLURM answers, if this machine belongs to a cluster."""
    if shutil.which("sinfo") is None:
        return ok("slurm", "no SLURM here; launcher slurm cannot be used")
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%P %D %t"], capture_output=True, text=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        return fail("slurm", "the controller does not answer", "see that slurmctld runs and slurm.conf names it")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["sinfo failed"])[-1]
        if "configuration source" in reason:  # its commands are installed, and no more
            return ok("slurm", "no cluster is configured here; launcher slurm cannot be used")
        return fail("slurm", reason, "see that slurmctld runs and slurm.conf names it")
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    return ok("slurm", ", ".join(f"{nodes} nodes {state} in {name}" for name, nodes, state in lines) or "no nodes")
