"""Saves and loads the states that a training resumes from, while it runs.

A state is a folder `checkpoints/step-N` under the checkpoint's own URL, on a file system that all machines share or in
an object store. It is complete once its `train_state.json` exists.
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

from infra.artifacts.artifact import cache_directory, fsync_path
from infra.errors import UserError
from infra.storage import filesystem
from pretrain.checkpoint import state_files
from pretrain.checkpoint.state_files import STATES, TRAIN_STATE, TRAINING
from pretrain.config import Retention
from pretrain.distributed import all_gather_object, barrier, broadcast_object, first_local_rank, rank_and_world_size
from pretrain.monitoring import metrics_log
from pretrain.monitoring.metrics_log import METRICS
from pretrain.sharding import state
from pretrain.sharding.base import Backend

Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class TrainState:
    """What a training has come to, apart from its tensors."""

    samples: int = 0
    """Seen, over all ranks."""
    rollbacks: int = 0
    """Times it went back to a saved state."""
    skipped_steps: int = 0
    """Steps that were skipped."""


class CheckpointManager:
    """The saved states of one training.

    Args:
        work: the local folder in which its artifact is made.
        url: where that artifact will be.
        retention: which states stay when newer ones have come.
    """

    def __init__(self, work: Path, url: str, retention: Retention) -> None:
        self.work, self.url, self.retention = work, url, retention
        self._writer = ThreadPoolExecutor(1, "saves")
        self._writing: tuple[int, TrainState, Future[None]] | None = None

    def latest_step(self) -> int:
        """Steps made at the last whole state; 0 where there is none. Called on all ranks, and the same on all.

        What a killed attempt left half-written is removed.

        Raises:
            UserError: some rank does not see the folder of the first one.
        """
        if self._is_local:
            self._require_shared()
        return broadcast_object(self._find_latest_step() if rank_and_world_size()[0] == 0 else 0)

    def _require_shared(self) -> None:
        marker = self.work / STATES / broadcast_object(f".shared-{os.getpid()}")
        if rank_and_world_size()[0] == 0:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        barrier()
        blind = [rank for rank, sees in enumerate(all_gather_object(marker.exists())) if not sees]
        if rank_and_world_size()[0] == 0:
            marker.unlink()
        if blind:
            raise UserError(
                f"{self.work}: rank {blind[0]} does not see this folder; choose an --out that all machines share, or "
                "one in an object store"
            )

    def _find_latest_step(self) -> int:
        if self._is_finalized:
            return len(metrics_log.parse_rows((self.work / TRAINING / METRICS).read_text()))
        whole = state_files.list_complete_steps(self.url)
        for step in state_files.list_steps(self.url) - whole:
            filesystem.remove(self._state_url(step))
        return max(whole, default=0)

    def save_async(self, backend: Backend, step: int, rows: Rows, train_state: TrainState) -> None:
        """Copy the state after some steps and start to write it; called on all ranks."""
        self.wait()
        rank_state = state.collect(backend)
        self._writing = step, train_state, self._writer.submit(self._write, step, rank_state, list(rows))

    def _write(self, step: int, rank_state: state.RankState, rows: Rows) -> None:
        """This rank's part; the first rank's has the telemetry."""
        folder = self._local_folder(step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths = state.write(rank_state, folder)
            if rank_and_world_size()[0] == 0:
                metrics_log.write_rows(folder / METRICS, rows)
                paths.append(folder / METRICS)
            for path in paths:
                fsync_path(path)
                if not self._is_local:
                    filesystem.upload(path, self._state_url(step, path.name))
                    path.unlink()
            if not self._is_local:
                with suppress(OSError):  # another rank of this machine still writes
                    folder.rmdir()
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{folder}: {reason}; the last whole state is unharmed, run again") from None

    def is_written(self) -> bool:
        """Whether this rank's part of the state that was begun is written, or none was begun."""
        return self._writing is None or self._writing[2].done()

    def wait(self) -> None:
        """Wait until the state that was begun is whole; called on all ranks."""
        if self._writing is not None:
            self._writing[2].result()
            barrier()
            self.commit()
            barrier()  # who ends now may take the first rank, still at work, along

    def commit(self) -> None:
        """Mark the state that `save_async` began as complete, and prune older ones; after `is_written` on all ranks."""
        if self._writing is None:
            return
        step, train_state, writing = self._writing
        writing.result()
        self._writing = None
        if rank_and_world_size()[0] == 0:
            self._write_train_state(step, train_state)
            if self._is_local:
                fsync_path(self._local_folder(step))
                fsync_path(self._local_folder(step).parent)
            self._prune()

    def _write_train_state(self, step: int, train_state: TrainState) -> None:
        filesystem.write_atomic(self._state_url(step, TRAIN_STATE), json.dumps(asdict(train_state)).encode())

    def _prune(self) -> None:
        """Remove the states that are neither among the last few nor young."""
        oldest = time.time() - 3600 * self.retention.hours
        for step in sorted(state_files.list_complete_steps(self.url))[: -self.retention.latest]:
            if filesystem.mtime(self._state_url(step, TRAIN_STATE)) <= oldest:
                # First: half a state must not be taken for a whole one.
                filesystem.remove(self._state_url(step, TRAIN_STATE))
                filesystem.remove(self._state_url(step))

    def load(self, backend: Backend, step: int) -> tuple[list[dict[str, float]], TrainState]:
        """Bring an engine to the state after some steps; return the telemetry's rows and the tally. On all ranks."""
        folder = self.work / TRAINING if self._is_finalized else self._local_folder(step)
        if not self._is_local and first_local_rank() == rank_and_world_size()[0]:
            self._download(step, folder)
        barrier()
        state.load(backend, folder)
        rows = metrics_log.parse_rows((folder / METRICS).read_text())
        train_state = TrainState(**json.loads((folder / TRAIN_STATE).read_text()))
        barrier()
        if not self._is_local and first_local_rank() == rank_and_world_size()[0]:
            shutil.rmtree(folder)
        return rows, train_state

    def update_train_state(self, step: int, train_state: TrainState) -> None:
        """Change the tally of a saved state; called on all ranks."""
        if rank_and_world_size()[0] == 0:
            self._write_train_state(step, train_state)
        barrier()

    def finalize(self, step: int) -> None:
        """Make the state after the last step part of the artifact; a kill at any moment loses nothing. On all ranks."""
        self.wait()
        barrier()
        if rank_and_world_size()[0] == 0 and not (self.work / TRAINING).exists():
            if self._is_local:
                self._local_folder(step).rename(self.work / TRAINING)
            else:
                partial = self.work / f".{TRAINING}"
                self._download(step, partial)
                partial.rename(self.work / TRAINING)
        if rank_and_world_size()[0] == 0:
            shutil.rmtree(self.work / STATES, ignore_errors=True)
        self._writer.shutdown()
        barrier()

    def _download(self, step: int, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in filesystem.list_files(self._state_url(step)):
            filesystem.download(self._state_url(step, name), folder / name)

    @property
    def states_url(self) -> str:
        """Where the states lie."""
        return filesystem.join(self.url, STATES)

    @property
    def _is_finalized(self) -> bool:
        return self._is_local and (self.work / TRAINING).exists()

    @property
    def _is_local(self) -> bool:
        return filesystem.is_local(self.url)

    def _local_folder(self, step: int) -> Path:
        """Where a state is written, or brought to, on this machine; machines may share a cache."""
        if self._is_local:
            return self.work / STATES / state_files.folder_name(step)
        return cache_directory() / "states" / f"{self.work.name}-{step}-{first_local_rank():05d}"

    def _state_url(self, step: int, *name: str) -> str:
        return filesystem.join(self.states_url, state_files.folder_name(step), *name)
