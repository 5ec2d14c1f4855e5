"""Daemons of a real server that a test starts: our children in the foreground, watched until the server answers."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path


class Daemons:
    """Started one after another and ended by whoever started them, however far they came.

    Args:
        what: the server, for messages.
        directory: keeps a log of each in `log/`, which is there.
        start_seconds: how long all of it may take to come up.
    """

    def __init__(self, what: str, directory: Path, start_seconds: float) -> None:
        self.what, self.directory, self.start_seconds = what, directory, start_seconds
        self.deadline = time.monotonic() + start_seconds
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str, environment: Mapping[str, str]) -> None:
        self.running[name] = self.launch(name, *command, environment=environment)

    def launch(self, name: str, *command: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command, of which nobody watches whether it lives."""
        with self._log(name).open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours: the daemons go in their order
            )

    def keep_waiting(self, name: str) -> None:
        """Wait a moment for something; raise if a daemon has ended or the time is up."""
        for daemon, process in self.running.items():
            if process.poll() is not None:
                raise self.failure(daemon, f"exit code {process.returncode}")
        if time.monotonic() > self.deadline:
            raise self.failure(name, f"not done {self.start_seconds:.0f} s after the start")
        time.sleep(0.1)

    def failure(self, name: str, what: str) -> RuntimeError:
        lines = self._log(name).read_text(errors="replace").splitlines()
        return RuntimeError("\n".join([f"{self.what} did not come up: {name}: {what}", *lines[-30:]]))

    def _log(self, name: str) -> Path:
        return self.directory / "log" / f"{name}.log"


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on; all are held before one is let go, so that they differ."""
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [holder.getsockname()[1] for holder in holders]
    finally:
        for holder in holders:
            holder.close()
