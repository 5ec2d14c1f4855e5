"""Measures in processes of their own: CPU-seconds and peak memory of nothing else."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infra.compute import memory


@dataclass(frozen=True)
class Measured:
    """What one call took."""

    result: Any
    cpu_seconds: float
    peak_gb: float
    """Of memory, with what was there before"""


Prepare = Callable[[], tuple[Any, ...]]


def measured(work: Callable[..., Any], prepare: Prepare, warm: Prepare | None = None) -> Measured:
    """Call `work(*prepare())` in a process of one thread; `prepare` is not measured.

    Args:
        warm: of a first call, not measured either, that loads libraries.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries of the new process look
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work, prepare, warm))


def _measured(work: Callable[..., Any], prepare: Prepare, warm: Prepare | None) -> Measured:
    if warm is not None:
        work(*warm())
    arguments = prepare()
    memory.reset_peak_memory()
    started = time.process_time()
    result = work(*arguments)
    return Measured(result, time.process_time() - started, memory.peak_memory_gb())
