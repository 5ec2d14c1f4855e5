"""Notices when a rank no longer comes along, and ends the job with its name instead of waiting for ever."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from torch._C._distributed_c10d import PrefixStore, Store

from infra.launch.job import report

EXIT_HANG = 70  # exit code


class Watchdog:
    """Each rank tells the others how far it is; a thread of every rank looks at all of them.

    Args:
        store: what all ranks share.
        rank: this one.
        world_size: how many there are.
        seconds: how long nobody may move.
        end: called with the message when that has lasted too long.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, seconds: float, end: Callable[[str], None] | None = None
    ) -> None:
        self.store = PrefixStore("watch", store)
        self.rank, self.world_size, self.seconds = rank, world_size, seconds
        self._end = end or _end_process
        self._count = 0
        self._done = threading.Event()

    def report(self, activity: str) -> None:
        """Say that this rank has come to another place, and what it does next."""
        self._count += 1
        self.store.set(str(self.rank), f"{self._count}/{activity}")

    @contextmanager
    def monitor(self) -> Iterator[None]:
        """Look at the others until the end of the context."""
        self.report("starting")
        thread = threading.Thread(target=self._monitor_ranks, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            with suppress(RuntimeError):  # the rank that keeps the store may have gone
                self.report("finishing")
            thread.join()

    def _monitor_ranks(self) -> None:
        places, since = self._read_progress(), time.monotonic()
        while not self._done.wait(min(self.seconds / 10, 10)):
            now = self._read_progress()
            if now != places:
                places, since = now, time.monotonic()
            elif time.monotonic() - since > self.seconds:
                self._end(self._describe(now))
                return

    def _read_progress(self) -> list[tuple[int, str]]:
        found = []
        for rank in range(self.world_size):
            known = self.store.check([str(rank)])
            place, _, what = self.store.get(str(rank)).decode().partition("/") if known else ("0", "", "starting")
            found.append((int(place), what))
        return found

    def _describe(self, places: list[tuple[int, str]]) -> str:
        last = min(place for place, _ in places)
        behind = [(rank, what) for rank, (place, what) in enumerate(places) if place == last]
        who = ", ".join(f"rank {rank} ({what})" for rank, what in behind)
        if len(behind) == self.world_size:
            return f"no rank has moved for {self.seconds:g} s; all are at: {behind[0][1]}"
        return f"{who} made no progress for {self.seconds:g} s; the other ranks are blocked"


def _end_process(message: str) -> None:
    # Not an exception: the main thread hangs in a collective, where none would reach it.
    print(f"fovea: {message}", file=sys.stderr, flush=True)
    report(EXIT_HANG, message)
    os._exit(EXIT_HANG)
