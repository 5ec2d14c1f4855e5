"""A real Prefect server of its own for tests, on loopback, with a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.daemons import Daemons, free_ports

START_SECONDS = 180.0
STOP_SECONDS = 40.0
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Server:
    """How to reach it: any Prefect client does, in this environment."""

    environment: dict[str, str]
    daemons: Daemons

    def start_worker(self, pool: str, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        command = ["env", "--chdir", str(directory), sys.executable, "-m", "prefect", "worker", "start", "--pool", pool]
        self.daemons.start("worker", *command, environment=self.environment)

    def kill_worker(self) -> None:
        """As if its machine were gone: the worker and the runs that it has started."""
        worker = psutil.Process(self.daemons.running.pop("worker").pid)
        for each in [worker, *worker.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        worker.wait()

    def asked(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the API answers."""
        data = None if body is None else json.dumps(body).encode()
        url = self.environment["PREFECT_API_URL"] + path
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def started(self, flow: str, parameters: dict[str, Any], name: str = "fovea") -> str:
        """A new run of a flow's deployment."""
        deployment = self.asked(f"/deployments/name/{flow}/{name}")
        return str(self.asked(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"])

    def state(self, run: str) -> str:
        return str(self.asked(f"/flow_runs/{run}")["state_type"])

    def waited(self, run: str, until: set[str], seconds: float = 180) -> str:
        """The state of a run, once it is one of some."""
        deadline = time.monotonic() + seconds
        while (now := self.state(run)) not in until:
            assert time.monotonic() < deadline, now
            time.sleep(0.5)
        return now

    def fovea(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("fovea")), *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300, check=False)


@contextmanager
def serving(directory: Path, database: str | None = None, **variables: str) -> Iterator[Server]:
    """A server until the end of the context; then its workers end too.

    Args:
        directory: its own; keeps the logs, and its records where there is no database.
        database: the address of one.
        variables: more of the environment that it and its workers have.
    """
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
        **variables,
    }
    if database is not None:
        environment["PREFECT_API_DATABASE_CONNECTION_URL"] = database
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
