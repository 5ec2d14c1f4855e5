"""What near-duplicates of a billion vectors would take: constants measured here, cells simulated, work scheduled.

On paper, N vectors of d dimensions in L cells, a vector visiting v of them, take 2NLd operations to be assigned and
2d times the pairs that meet to be joined; beyond memory, 2d bytes a visit are written and read once. Measured are the
rate of both, v, and how unevenly cells are visited. A run of another size than those measured on says how far off the
forecast is. Then cells are drawn as unevenly as they were measured, and handed out to machines, each of which reads the
next cell while it joins one.
"""

from __future__ import annotations

import heapq
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.near_duplicate_peers import learned
from benchmarks.report import Row
from benchmarks.synthetic_vectors import planted
from curation.similarity.cells import SAMPLE, default_num_cells
from curation.similarity.selfjoin import SelfJoin
from curation.similarity.tiles import CpuTiles, WorkerPool
from curation.steps.config import NearDuplicates
from infra.compute.sharded_array import ShardedArray

_DIM = 256
_LEARNED_ON, _CHECKED_ON = 200_000, 800_000
_HOUR = 3600.0
_BYTES_A_ROW, _BYTES_A_VISIT = 40 + 40, 8  # verdicts and a forest's edges; who visits a cell
_BILLION = 1_000_000_000


@dataclass(frozen=True)
class Constants:
    """Of one thread."""

    assigning: float
    """Operations a second"""
    joining: float
    visits: float
    """Cells a vector visits"""
    sizes: np.ndarray
    """Visits of each cell over their mean"""
    crowded: np.ndarray
    """In which only owners meet all, bool"""
    owners: np.ndarray
    """Owners of each cell over its visits"""


@dataclass(frozen=True)
class Machines:
    """What is at hand; rates of float32 products that a dense library reaches."""

    name: str
    count: int
    speed: float
    """Times one thread here"""
    read: float
    """Bytes a second from the runs, of one machine"""


def _measured(count: int) -> tuple[Constants, float]:
    """Constants, and the CPU-seconds of the whole join."""
    vectors, settings = ShardedArray([planted(count, _DIM, 1, 0.65)]), NearDuplicates()
    workers, everyone = WorkerPool(CpuTiles(), 1), np.arange(count)
    started = time.process_time()
    cells = learned(vectors, workers)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        join = SelfJoin(cells, settings.threshold, workers, Path(folder), 8 << 30)
        partition = join.partition(vectors, everyone)
        assigned = time.process_time()
        join.run_partition(partition, None, lambda done: None)
        ended = time.process_time()
        run = partition.inverted_lists()
    visits = np.diff(run.starts)
    shares = run.primary / np.maximum(visits, 1)
    pairs = _pairs(visits, shares, cells.dense).sum()
    constants = Constants(
        assigning=2.0 * count * len(cells) * _DIM / (assigned - began),
        joining=2.0 * _DIM * pairs / (ended - assigned),
        visits=visits.sum() / count,
        sizes=visits / visits.mean(),
        crowded=cells.dense,
        owners=shares,
    )
    return constants, ended - started


def _pairs(visits: np.ndarray, owners: np.ndarray, crowded: np.ndarray) -> np.ndarray:
    """That meet in each cell."""
    visits = visits.astype(np.float64)
    mine = owners * visits
    return np.where(crowded, mine * visits - mine**2 / 2, visits**2 / 2)


def _cells(constants: Constants, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Visits and pairs of each cell of a run of that size, drawn from those measured."""
    number = default_num_cells(count)
    like = np.random.default_rng(0).integers(0, len(constants.sizes), number)
    visits = constants.sizes[like] * (constants.visits * count / number)
    return visits, _pairs(visits, constants.owners[like], constants.crowded[like])


def _seconds(constants: Constants, count: int) -> float:
    """CPU-seconds of one thread."""
    visits, pairs = _cells(constants, count)
    learning = 4 * 2.0 * SAMPLE * len(visits) ** 2 * _DIM / constants.assigning
    assigning = 2.0 * count * len(visits) * _DIM / constants.assigning
    return learning + assigning + 2.0 * _DIM * pairs.sum() / constants.joining


def _scheduled(constants: Constants, count: int, machines: Machines) -> tuple[float, float]:
    """Seconds until the last cell is joined, and the share of them that machines wait for their disks."""
    visits, pairs = _cells(constants, count)
    speed = machines.speed
    assigning = 2.0 * count * len(visits) * _DIM / (constants.assigning * speed * machines.count)
    writing = 2.0 * _DIM * visits.sum() / (machines.read * machines.count)
    reads, works = 2.0 * _DIM * visits / machines.read, 2.0 * _DIM * pairs / (constants.joining * speed)
    free = [(0.0, 0.0) for _ in range(machines.count)]  # when each has joined its last cell, and read its next
    heapq.heapify(free)
    waited = 0.0
    for read, work in zip(reads.tolist(), works.tolist(), strict=True):
        joined, had = heapq.heappop(free)
        ready = had + read
        waited += max(ready - joined, 0.0)
        heapq.heappush(free, (max(joined, ready) + work, ready))
    ended = max(joined for joined, _ in free)
    return max(assigning, writing) + ended, waited / (ended * machines.count)


def measure() -> Sequence[Row]:
    constants, _ = _measured(_LEARNED_ON)
    _, true = _measured(_CHECKED_ON)
    told = _seconds(constants, _CHECKED_ON)
    table = [
        Row("assigning, one thread", constants.assigning / 1e9, "GFLOP/s"),
        Row("joining, one thread", constants.joining / 1e9, "GFLOP/s"),
        Row("cells a vector visits", constants.visits, ""),
        Row(f"{_CHECKED_ON:,} vectors: forecast of CPU", told, "s", true, true / told),
    ]
    fleets = [
        Machines("2 cores, one disk", 1, 2.0, 0.7e9),
        Machines("64 cores, NVMe", 1, 64.0, 5e9),
        Machines("one H100 (40 TFLOP/s in float32), NVMe", 1, 40e12 / constants.joining, 5e9),
        Machines("eight H100, an NVMe each", 8, 40e12 / constants.joining, 5e9),
    ]
    for count in (10_000_000, 100_000_000, _BILLION):
        visits, _ = _cells(constants, count)
        table.append(Row(f"{count:,}: runs on disk", 2.0 * _DIM * visits.sum() / 1e12, "TB"))
        held = _BYTES_A_ROW * count + _BYTES_A_VISIT * visits.sum()
        table.append(Row(f"{count:,}: memory beside tiles and settings", held / 1e9, "GB"))
        for machines in fleets:
            seconds, waiting = _scheduled(constants, count, machines)
            table.append(Row(f"{count:,}: {machines.name}, waits {100 * waiting:.0f} %", seconds / _HOUR, "h"))
    return table


if __name__ == "__main__":
    report.main("Near-duplicates of a billion vectors", measure)
