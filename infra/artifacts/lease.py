"""Who makes a remote artifact: one process at a time, on whatever machine; local ones are locked by the file system.

A claim is a numbered file beside the artifact that only one process can create (object stores have no locks, but refuse
to create what is there). Its owner rewrites it every few seconds. One that stands still is of a process that is gone:
the next number takes over, and who was only slow finds that out with its next beat, or before it commits, and ends.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from infra.errors import EXIT_LOCKED, ArtifactLockedError, UserError
from infra.storage import filesystem

FOLDER, OWNER = ".lease", ".owner"
HEARTBEAT_S = 10.0
LEASE_TIMEOUT_S = 60.0
"""How long a claim may stand still; each machine measures it by its own clock."""


@dataclass
class Lease:
    """A claim that this process holds."""

    url: str
    number: int
    owner: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    _heartbeats: int = 0
    _released: threading.Event = field(default_factory=threading.Event)

    def require(self) -> None:
        """Make sure that the claim still counts.

        Raises:
            UserError: this process was silent for so long that another one has taken over.
        """
        if not self._is_current():
            raise UserError(self._lost_message())

    def _is_current(self) -> bool:
        return max(_numbers(self.url), default=0) == self.number and self._is_ours()

    def _lost_message(self) -> str:
        return f"{self.url}: this process was cut off for a while and another one has taken over"

    def _serialize(self) -> bytes:
        self._heartbeats += 1
        return json.dumps({"owner": self.owner, "token": self.token, "beats": self._heartbeats}).encode()

    def _file_url(self) -> str:
        return filesystem.join(self.url, FOLDER, f"{self.number:06d}.json")

    def _is_ours(self) -> bool:
        return _read(self._file_url()).get("token") == self.token

    def _create(self) -> bool:
        filesystem.create_exclusive(self._file_url(), self._serialize())
        return self._is_ours()

    def _send_heartbeats(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            with suppress(UserError):  # the network is down: others will see that too
                if not self._is_current():
                    _end_process(self._lost_message())
                    return
                filesystem.write_atomic(self._file_url(), self._serialize())

    def _release(self, heartbeats: threading.Thread) -> None:
        self._released.set()
        heartbeats.join()
        with suppress(UserError):  # what cannot be removed stands still from now on
            for number in _numbers(self.url):
                if number < self.number or (number == self.number and self._is_ours()):
                    filesystem.remove(filesystem.join(self.url, FOLDER, f"{number:06d}.json"))


def _end_process(message: str) -> None:
    """End at once: whatever this process still wrote would lie among what the other one writes."""
    print(f"fovea: {message}", file=sys.stderr, flush=True)
    os._exit(EXIT_LOCKED)


@contextmanager
def hold_lease(url: str, work: Path) -> Iterator[Lease]:
    """Hold the claim on a remote artifact.

    Args:
        work: the local folder it is made in, which this process has locked: a claim from the same folder is of a
            process that is gone.

    Raises:
        ArtifactLockedError: another process is making it.
    """
    lease = _acquire(url, _owner(work))
    heartbeats = threading.Thread(target=lease._send_heartbeats, name="claim", daemon=True)
    heartbeats.start()
    try:
        yield lease
    finally:
        lease._release(heartbeats)


def _owner(work: Path) -> str:
    """Who works in a folder, the same after a crash; a name and a path alone are no identity where containers share
    them."""
    mark = work / OWNER
    if not mark.exists():
        filesystem.write_atomic(str(mark), secrets.token_hex(8).encode())
    return f"{socket.gethostname()}:{mark.read_text()}"


def _acquire(url: str, owner: str) -> Lease:
    while True:
        last = max(_numbers(url), default=0)
        if last and not _is_abandoned(url, last, owner):
            continue
        lease = Lease(url, last + 1, owner)
        if lease._create():
            return lease


def _is_abandoned(url: str, number: int, owner: str) -> bool:
    """Whether the owner of a claim is gone; False where the claim is.

    Raises:
        ArtifactLockedError: the owner lives.
    """
    file_url = filesystem.join(url, FOLDER, f"{number:06d}.json")
    first = _read(file_url)
    deadline = time.monotonic() + LEASE_TIMEOUT_S
    while first.get("owner") != owner and time.monotonic() < deadline:
        time.sleep(min(HEARTBEAT_S / 4, LEASE_TIMEOUT_S / 4))
        if not (now := _read(file_url)):
            return False
        if now != first:
            who = first["owner"].partition(":")[0]
            raise ArtifactLockedError(
                f"{url}: another process, on {who}, is making this artifact; wait for it or stop it"
            )
    return True


def _numbers(url: str) -> list[int]:
    folder = filesystem.join(url, FOLDER)
    files, path = filesystem.connect(folder)
    files.invalidate_cache()
    names = (Path(each).stem for each in filesystem.with_retries(folder, lambda: files.find(path)))
    return [int(name) for name in names if name.isdigit()]


def _read(file_url: str) -> dict[str, str]:
    """A claim's content; nothing where it is gone."""
    return dict(json.loads(filesystem.read_bytes(file_url))) if filesystem.exists(file_url) else {}
