"""Near-duplicates of ten million vectors of 256 dimensions within 4 GB of memory, on two cores; half an hour.

`ROWS=2000000 python -m benchmarks.near_duplicates_10m` takes fewer. Needs 25 GB of disk in $TMPDIR for ten million.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import report
from benchmarks.near_duplicate_peers import learned
from benchmarks.report import Row
from benchmarks.synthetic_vectors import planted
from curation.similarity.audit import audit
from curation.similarity.selfjoin import SelfJoin
from curation.similarity.tiles import CpuTiles, WorkerPool
from curation.steps.config import NearDuplicates
from infra.compute import memory
from infra.compute.sharded_array import ShardedArray

_DIM, _PART, _MEMORY, _LIMIT = 256, 500_000, 3 << 30, 4.0
_AUDITED = 500


def measure() -> Sequence[Row]:
    count = max(int(os.environ.get("ROWS", "10000000")), _PART)
    with tempfile.TemporaryDirectory() as folder:
        return _measure(count, Path(folder))


def _measure(count: int, folder: Path) -> Sequence[Row]:
    parts = [folder / f"{number:05d}.npy" for number in range(count // _PART)]
    for number, path in enumerate(parts):
        np.save(path, planted(_PART, _DIM, number, 0.65))
    vectors, settings = ShardedArray(parts), NearDuplicates()
    workers = WorkerPool(CpuTiles(), len(os.sched_getaffinity(0)))
    memory.reset_peak_memory()
    cpu, clock = time.process_time(), time.monotonic()
    cells = learned(vectors, workers)
    everyone = np.arange(len(vectors))
    forest = SelfJoin(cells, settings.threshold, workers, folder, _MEMORY).run(vectors, everyone)
    took = time.process_time() - cpu, time.monotonic() - clock
    peak = memory.peak_memory_gb()
    spilled = sum(path.stat().st_size for path in folder.glob("run-*.npy")) / (1 << 30)
    labels = forest.components()
    sample = np.sort(np.random.default_rng(1).permutation(len(vectors))[:_AUDITED])
    recall = audit(vectors, everyone, labels, settings.threshold, sample, workers).facts()
    removed = len(forest.edges()[0]) / (len(parts) * _PART // 5)
    return [
        Row("rows", len(vectors), ""),
        Row("CPU", took[0], "s"),
        Row("time", took[1], "s"),
        Row("peak memory", peak, "GB", _LIMIT, _LIMIT / peak, 1.0),
        Row("on disk, beside the vectors", spilled, "GB"),
        Row("planted copies removed", removed, ""),
        Row("recall by audit, low end", recall["low"], ""),
        Row("recall by audit", recall["value"], ""),
    ]


if __name__ == "__main__":
    report.main("Near-duplicates at scale", measure)
