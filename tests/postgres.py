"""A real PostgreSQL server on loopback for tests: Debian's, as its own user, since it refuses to run as root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.daemons import Daemons, free_ports

START_SECONDS, STOP_SECONDS = 60.0, 20.0


def programs() -> Path | None:
    """The folder of the newest server's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


def missing() -> str | None:
    """Why this machine cannot run it, or None if it can."""
    if programs() is None:
        return "no PostgreSQL here: install Debian's postgresql"
    if os.geteuid() != 0 or shutil.which("runuser") is None:
        return "no PostgreSQL here: becoming its user needs root"
    return None


@contextmanager
def postgres(directory: Path) -> Iterator[str]:
    """The address of an empty database, as Prefect takes it; `directory` is its own and keeps the log."""
    found = programs()
    assert found is not None
    (port,) = free_ports(1)
    data = directory / "data"
    for folder in (data, directory / "log"):
        folder.mkdir(parents=True)
    shutil.chown(data, "postgres")
    _open_way(directory)
    as_its_user = ["runuser", "-u", "postgres", "--"]
    subprocess.run(
        [*as_its_user, str(found / "initdb"), "-D", str(data), "-A", "trust"], check=True, capture_output=True
    )
    daemons = Daemons("PostgreSQL", directory, START_SECONDS)
    options = ["-D", str(data), "-p", str(port), "-k", str(data), "-c", "listen_addresses=127.0.0.1"]
    daemons.start("postgres", *as_its_user, str(found / "postgres"), *options, environment=dict(os.environ))
    try:
        while _asked(found, port, "SELECT 1").returncode:
            daemons.keep_waiting("postgres")
        _asked(found, port, "CREATE DATABASE prefect")
        yield f"postgresql+asyncpg://postgres@127.0.0.1:{port}/prefect"
    finally:
        process = daemons.running["postgres"]
        for server in psutil.Process(process.pid).children() if process.poll() is None else []:
            server.send_signal(signal.SIGINT)  # fast: it does not wait for its clients
        process.wait(STOP_SECONDS)


def _open_way(directory: Path) -> None:
    """Let the server's user through to its folder."""
    for folder in (directory, *directory.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)


def _asked(found: Path, port: int, statement: str) -> subprocess.CompletedProcess[bytes]:
    command = [str(found / "psql"), "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-qc", statement, "postgres"]
    return subprocess.run(command, capture_output=True, check=False)
