"""The states a training can go on from: written while it goes on, whole once their tally is there, kept as asked.

Each is a folder `steps/N`, under the checkpoint's own URL: a folder that all machines share, or an object store.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from infra import storage
from infra.artifacts import cache_directory, flush
from infra.errors import UserError
from pretrain import state_files, telemetry
from pretrain.config import Retention
from pretrain.ranks import barrier, first_of_machine, from_all_ranks, from_first_rank, world
from pretrain.sharding import state
from pretrain.sharding.base import Engine
from pretrain.state_files import STEPS, TALLY, TRAINING
from pretrain.telemetry import METRICS

Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Tally:
    """What a training has come to, apart from its tensors."""

    samples: int = 0
    """Seen, over all ranks."""
    rewinds: int = 0
    """Times it went back to a saved state."""
    skipped: int = 0
    """Steps that were skipped."""


class Saves:
    """The saved states of one training.

    Args:
        work: the local folder in which its artifact is made.
        url: where that artifact will be.
        retention: which states stay when newer ones have come.
    """

    def __init__(self, work: Path, url: str, retention: Retention) -> None:
        self.work, self.url, self.retention = work, url, retention
        self._writer = ThreadPoolExecutor(1, "saves")
        self._writing: tuple[int, Tally, Future[None]] | None = None

    def newest(self) -> int:
        """Steps made at the last whole state; 0 where there is none. Called on all ranks, and the same on all.

        What a killed attempt left half-written is removed.

        Raises:
            UserError: some rank does not see the folder of the first one.
        """
        if self._local:
            self._require_shared()
        return from_first_rank(self._newest() if world()[0] == 0 else 0)

    def _require_shared(self) -> None:
        sign = self.work / STEPS / from_first_rank(f".shared-{os.getpid()}")
        if world()[0] == 0:
            sign.parent.mkdir(parents=True, exist_ok=True)
            sign.touch()
        barrier()
        blind = [rank for rank, sees in enumerate(from_all_ranks(sign.exists())) if not sees]
        if world()[0] == 0:
            sign.unlink()
        if blind:
            raise UserError(
                f"{self.work}: rank {blind[0]} does not see this folder; choose an --out that all machines share, or "
                "one in an object store"
            )

    def _newest(self) -> int:
        if self._ended:
            return len(telemetry.parse((self.work / TRAINING / METRICS).read_text()))
        whole = state_files.whole(self.url)
        for step in state_files.folders(self.url) - whole:
            storage.remove(self._url(step))
        return max(whole, default=0)

    def begin(self, engine: Engine, step: int, rows: Rows, tally: Tally) -> None:
        """Copy the state after some steps and start to write it; called on all ranks."""
        self.settle()
        part = state.collect(engine)
        self._writing = step, tally, self._writer.submit(self._write, step, part, list(rows))

    def _write(self, step: int, part: state.Part, rows: Rows) -> None:
        """This rank's part; the first rank's has the telemetry."""
        folder = self._here(step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths = state.write(part, folder)
            if world()[0] == 0:
                telemetry.write(folder / METRICS, rows)
                paths.append(folder / METRICS)
            for path in paths:
                flush(path)
                if not self._local:
                    storage.upload(path, self._url(step, path.name))
                    path.unlink()
            if not self._local:
                with suppress(OSError):  # another rank of this machine still writes
                    folder.rmdir()
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{folder}: {reason}; the last whole state is unharmed, run again") from None

    def written(self) -> bool:
        """Whether this rank's part of the state that was begun is written, or none was begun."""
        return self._writing is None or self._writing[2].done()

    def settle(self) -> None:
        """Wait until the state that was begun is whole; called on all ranks."""
        if self._writing is not None:
            self._writing[2].result()
            barrier()
            self.commit()
            barrier()  # who ends now may take the first rank, still at work, along

    def commit(self) -> None:
        """Declare the state that was begun whole, after `written` on all ranks; then remove what need not be kept."""
        if self._writing is None:
            return
        step, tally, writing = self._writing
        writing.result()
        self._writing = None
        if world()[0] == 0:
            self._declare(step, tally)
            if self._local:
                flush(self._here(step))
                flush(self._here(step).parent)
            self._prune()

    def _declare(self, step: int, tally: Tally) -> None:
        storage.write_atomic(self._url(step, TALLY), json.dumps(asdict(tally)).encode())

    def _prune(self) -> None:
        """Remove the states that are neither among the last few nor young."""
        oldest = time.time() - 3600 * self.retention.hours
        for step in sorted(state_files.whole(self.url))[: -self.retention.latest]:
            if storage.modified(self._url(step, TALLY)) <= oldest:
                storage.remove(self._url(step, TALLY))  # first: half a state must not be taken for a whole one
                storage.remove(self._url(step))

    def load(self, engine: Engine, step: int) -> tuple[list[dict[str, float]], Tally]:
        """Bring an engine to the state after some steps; return the telemetry's rows and the tally. On all ranks."""
        folder = self.work / TRAINING if self._ended else self._here(step)
        if not self._local and first_of_machine() == world()[0]:
            self._fetch(step, folder)
        barrier()
        state.load(engine, folder)
        rows = telemetry.parse((folder / METRICS).read_text())
        tally = Tally(**json.loads((folder / TALLY).read_text()))
        barrier()
        if not self._local and first_of_machine() == world()[0]:
            shutil.rmtree(folder)
        return rows, tally

    def revise(self, step: int, tally: Tally) -> None:
        """Change the tally of a saved state; called on all ranks."""
        if world()[0] == 0:
            self._declare(step, tally)
        barrier()

    def keep(self, step: int) -> None:
        """Make the state after the last step part of the artifact; a kill at any moment loses nothing. On all ranks."""
        self.settle()
        barrier()
        if world()[0] == 0 and not (self.work / TRAINING).exists():
            if self._local:
                self._here(step).rename(self.work / TRAINING)
            else:
                partial = self.work / f".{TRAINING}"
                self._fetch(step, partial)
                partial.rename(self.work / TRAINING)
        if world()[0] == 0:
            shutil.rmtree(self.work / STEPS, ignore_errors=True)
        self._writer.shutdown()
        barrier()

    def _fetch(self, step: int, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in storage.list_files(self._url(step)):
            storage.download(self._url(step, name), folder / name)

    @property
    def folder(self) -> str:
        """Where the states lie."""
        return storage.join(self.url, STEPS)

    @property
    def _ended(self) -> bool:
        return self._local and (self.work / TRAINING).exists()

    @property
    def _local(self) -> bool:
        return storage.is_local(self.url)

    def _here(self, step: int) -> Path:
        """Where a state is written, or brought to, on this machine; machines may share a cache."""
        if self._local:
            return self.work / STEPS / str(step)
        return cache_directory() / "states" / f"{self.work.name}-{step}-{first_of_machine():05d}"

    def _url(self, step: int, *name: str) -> str:
        return storage.join(self.folder, str(step), *name)
