"""Ingest of shards in a bucket beside reading and hashing them alone, in seconds of the clock.

`python -m benchmarks.ingest_s3 s3://bucket/shards` reads the shards there, by the credentials and endpoint of the
environment. The peer reads them one after the other through fsspec, in pieces of 4 MiB, and hashes every byte once.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import tempfile
import time

from benchmarks.report import Row, compared, main
from curation.config import IngestConfig
from curation.ingest.ingest import ingest
from infra.storage import filesystem

ROUNDS = 3


def _ingest(source: str, workers: int) -> float:
    with tempfile.TemporaryDirectory() as fresh:
        os.environ["FOVEA_CACHE"] = fresh
        started = time.perf_counter()
        ingest(IngestConfig(source=source, out=f"{fresh}/out", check="header", workers=workers))
        return time.perf_counter() - started


def _read(source: str) -> float:
    started = time.perf_counter()
    for name in filesystem.list_files(source):
        digest = hashlib.sha256()
        with filesystem.open_read(filesystem.join(source, name)) as file:
            while piece := file.read(4 << 20):
                digest.update(piece)
    return time.perf_counter() - started


def measure() -> list[Row]:
    found: dict[str, list[float]] = {"read": [], "1 process": [], "2 processes": []}
    for _ in range(ROUNDS):
        found["read"].append(_read(SOURCE))
        for workers in (1, 2):
            found[list(found)[workers]].append(_ingest(SOURCE, workers))
    seconds = {name: statistics.median(each) for name, each in found.items()}
    return [compared(f"ingest, {name}", seconds[name], seconds["read"], "s", 0.8) for name in list(seconds)[1:]]


if __name__ == "__main__":
    SOURCE = sys.argv.pop(1)
    main(f"Ingest of {SOURCE}", measure)
