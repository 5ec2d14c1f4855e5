"""Work spread over a Ray cluster. The only module that imports ray."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from infra.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
_SECONDS = 10.0  # in which the head must answer
_RETRIES = 5  # of a task whose node died
_AHEAD = 2  # tasks a core that wait to be taken


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster whose machines have Fovea installed and see the same storage.

    Args:
        address: `host:port` of its head, or `auto` for the one that this machine belongs to.
    """

    address: str

    def map(self, work: Callable[[T], R], items: Iterable[T], together: int = 16, on_gpus: bool = False) -> Iterator[R]:
        """Results in the order of the items. What a machine that dies had in hand is done again elsewhere.

        Args:
            work: sent once to each machine; what it changes stays there.
            together: items of a task.
            on_gpus: give each task a GPU, where the cluster has any.

        Raises:
            UserError: no cluster answers.
        """
        ray = self._connect()
        resources = ray.cluster_resources()
        gpus = 1 if on_gpus and resources.get("GPU") else 0
        task = ray.remote(_do).options(max_retries=_RETRIES, num_gpus=gpus)
        most = max(int(_AHEAD * resources.get("GPU" if gpus else "CPU", 1)), 1)
        shared, left = ray.put(work), iter(items)
        waiting: deque[Any] = deque()
        while some := list(islice(left, together)):
            waiting.append(task.remote(shared, some, os.getcwd()))
            if len(waiting) >= most:
                yield from self._take_results(waiting)
        while waiting:
            yield from self._take_results(waiting)

    def _take_results(self, waiting: deque[Any]) -> list[Any]:
        import ray

        try:
            return ray.get(waiting.popleft())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def _connect(self) -> Any:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UserError("ray: not installed; pip install 'fovea[ray]', or leave the setting out") from None
        if not ray.is_initialized():
            try:
                if self.address != "auto":  # Ray itself would wait for minutes
                    host, _, port = self.address.rpartition(":")
                    socket.create_connection((host, int(port)), _SECONDS).close()
                ray.init(self.address, logging_level=logging.ERROR, log_to_driver=False)
            except (OSError, RuntimeError, ValueError) as error:
                raise UserError(f"ray: {self.address}: no cluster answers: {error}".splitlines()[0]) from None
        return ray


def _do(work: Callable[[T], R], items: list[T], folder: str) -> list[R]:
    with contextlib.chdir(folder), threadpool_limits(1):  # relative paths mean the same there; a task a core
        return [work(item) for item in items]
