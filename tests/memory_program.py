"""Joins vectors on disk under a limit of memory that the system enforces: program FILE MEMORY LIMIT, in bytes."""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

import numpy as np

from curation.similarity.cells import SAMPLE, Cells, default_num_cells
from curation.similarity.selfjoin import SelfJoin
from curation.similarity.tiles import CpuTiles, WorkerPool
from infra.compute.sharded_array import ShardedArray


def data_bytes() -> int:
    """Private memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) << 10


def main(file: str, memory: int, limit: int) -> None:
    vectors, workers = ShardedArray([Path(file)]), WorkerPool(CpuTiles(), 1)
    count = default_num_cells(len(vectors))
    sample = vectors.take(np.sort(np.random.default_rng(0).permutation(len(vectors))[: SAMPLE * count]))
    cells = Cells.learn(sample, count, 4, 0.05, workers)
    del sample
    most = data_bytes() + limit
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        forest = SelfJoin(cells, 0.9, workers, Path(folder), memory).run(vectors, np.arange(len(vectors)))
    a, b, scores = forest.edges()
    print(len(a), int(a.sum()), int(b.sum()), float(scores.sum()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
