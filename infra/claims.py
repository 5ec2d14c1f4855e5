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

from infra import storage
from infra.errors import EXIT_LOCKED, Busy, UserError

FOLDER, OWNER = ".claims", ".owner"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
"""How long a claim may stand still; each machine measures it by its own clock."""


@dataclass
class Claim:
    """A claim that this process holds."""

    url: str
    number: int
    owner: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    _beats: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def require(self) -> None:
        """Make sure that the claim still counts.

        Raises:
            UserError: this process was silent for so long that another one has taken over.
        """
        if not self._counts():
            raise UserError(self._lost())

    def _counts(self) -> bool:
        return max(_numbers(self.url), default=0) == self.number and self._is_ours()

    def _lost(self) -> str:
        return f"{self.url}: this process was cut off for a while and another one has taken over"

    def _content(self) -> bytes:
        self._beats += 1
        return json.dumps({"owner": self.owner, "token": self.token, "beats": self._beats}).encode()

    def _place(self) -> str:
        return storage.join(self.url, FOLDER, f"{self.number:06d}.json")

    def _is_ours(self) -> bool:
        return _read(self._place()).get("token") == self.token

    def _take(self) -> bool:
        storage.create(self._place(), self._content())
        return self._is_ours()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with suppress(UserError):  # the network is down: others will see that too
                if not self._counts():
                    _end_process(self._lost())
                    return
                storage.write_atomic(self._place(), self._content())

    def _release(self, beating: threading.Thread) -> None:
        self._over.set()
        beating.join()
        with suppress(UserError):  # what cannot be removed stands still from now on
            for number in _numbers(self.url):
                if number < self.number or (number == self.number and self._is_ours()):
                    storage.remove(storage.join(self.url, FOLDER, f"{number:06d}.json"))


def _end_process(message: str) -> None:
    """End at once: whatever this process still wrote would lie among what the other one writes."""
    print(f"fovea: {message}", file=sys.stderr, flush=True)
    os._exit(EXIT_LOCKED)


@contextmanager
def claimed(url: str, work: Path) -> Iterator[Claim]:
    """Hold the claim on a remote artifact.

    Args:
        work: the local folder it is made in, which this process has locked: a claim from the same folder is of a
            process that is gone.

    Raises:
        Busy: another process is making it.
    """
    claim = _taken(url, _owner(work))
    beating = threading.Thread(target=claim._beat, name="claim", daemon=True)
    beating.start()
    try:
        yield claim
    finally:
        claim._release(beating)


def _owner(work: Path) -> str:
    """Who works in a folder, the same after a crash; a name and a path alone are no identity where containers share
    them."""
    mark = work / OWNER
    if not mark.exists():
        storage.write_atomic(str(mark), secrets.token_hex(8).encode())
    return f"{socket.gethostname()}:{mark.read_text()}"


def _taken(url: str, owner: str) -> Claim:
    while True:
        last = max(_numbers(url), default=0)
        if last and not _abandoned(url, last, owner):
            continue
        claim = Claim(url, last + 1, owner)
        if claim._take():
            return claim


def _abandoned(url: str, number: int, owner: str) -> bool:
    """Whether the owner of a claim is gone; False where the claim is.

    Raises:
        Busy: the owner lives.
    """
    place = storage.join(url, FOLDER, f"{number:06d}.json")
    first = _read(place)
    deadline = time.monotonic() + STALE_SECONDS
    while first.get("owner") != owner and time.monotonic() < deadline:
        time.sleep(min(BEAT_SECONDS / 4, STALE_SECONDS / 4))
        if not (now := _read(place)):
            return False
        if now != first:
            who = first["owner"].partition(":")[0]
            raise Busy(f"{url}: another process, on {who}, is making this artifact; wait for it or stop it")
    return True


def _numbers(url: str) -> list[int]:
    folder = storage.join(url, FOLDER)
    files, path = storage.filesystem(folder)
    files.invalidate_cache()
    names = (Path(each).stem for each in storage.persistently(folder, lambda: files.find(path)))
    return [int(name) for name in names if name.isdigit()]


def _read(place: str) -> dict[str, str]:
    """A claim's content; nothing where it is gone."""
    return dict(json.loads(storage.read_bytes(place))) if storage.exists(place) else {}
