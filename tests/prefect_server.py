"""A real Prefect server of its own for tests, on loopback, with a worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.daemons import Daemons, free_ports

START_SECONDS = 180.0
STOP_SECONDS = 40.0


@dataclass(frozen=True)
class Server:
    """How to reach it: any Prefect client does, in this environment."""

    environment: dict[str, str]
    daemons: Daemons

    def start_worker(self, pool: str, directory: Path) -> None:
        directory.mkdir()
        command = ["env", "--chdir", str(directory), sys.executable, "-m", "prefect", "worker", "start", "--pool", pool]
        self.daemons.start("worker", *command, environment=self.environment)

    def fovea(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("fovea")), *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300, check=False)


@contextmanager
def serving(directory: Path) -> Iterator[Server]:
    """A server that keeps its records in a folder, until the end of the context; then its workers end too."""
    (port,) = free_ports(1)
    (directory / "log").mkdir()
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(directory / "home"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "FOVEA_CACHE": str(directory / "cache"),
    }
    daemons = Daemons("prefect", directory, START_SECONDS)
    command = ["server", "start", "--host", "127.0.0.1", "--port", str(port)]
    try:
        daemons.start("server", sys.executable, "-m", "prefect", *command, environment=environment)
        while not _healthy(url):
            daemons.keep_waiting("server")
        yield Server(environment, daemons)
    finally:
        for name, process in reversed(daemons.running.items()):
            process.send_signal(signal.SIGINT if name == "worker" else signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
