"""The cache of parts of remote files: right, bounded, shared."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.storage import block_cache, range_reader
from infra.storage.block_cache import BlockCache, CachedRange

DATA = np.random.default_rng(0).bytes(100_000)
URL = "memory://cache-test/file"


@pytest.fixture(autouse=True)
def _remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(block_cache, "BLOCK", 1000)
    files = fsspec.filesystem("memory")
    files.pipe_file("/cache-test/file", DATA)
    yield
    files.rm("/cache-test", recursive=True)


def span(start: int, size: int) -> CachedRange:
    return CachedRange(URL, "aa" + "0" * 62, len(DATA), start, size)


def used(directory: Path) -> int:
    total = 0
    for path in directory.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):  # another process may remove or rename it
            total += path.stat().st_size
    return total


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 99_999), st.integers(0, 5000)), max_size=6))
def test_spans_are_the_files_bytes(tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]]) -> None:
    store = BlockCache(tmp_path_factory.mktemp("c"), 50_000)
    for _ in range(2):
        found = store.read([span(*place) for place in places])
        assert found == [DATA[start : start + size] for start, size in places]


def test_what_is_kept_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlockCache(tmp_path, 1_000_000)
    store.read([span(500, 3000)])
    monkeypatch.setattr(range_reader, "read_ranges", lambda wanted: pytest.fail("read again"))
    assert store.read([span(600, 2000)]) == [DATA[600:2600]]


def test_the_bound_holds_and_what_was_used_last_stays(tmp_path: Path) -> None:
    store = BlockCache(tmp_path, 20_000)
    for block in range(90):
        store.read([span(1000 * block, 10)])
        store.read([span(0, 10)])
        for path in tmp_path.glob("*/*"):  # the clock of the file system is too coarse for so many reads
            os.utime(path, ns=(path.stat().st_mtime_ns - 10**9,) * 2)
        assert used(tmp_path) <= 20_000
    assert (tmp_path / "aa" / f"aa{'0' * 62}-000000").exists()


def test_a_block_cut_short_is_fetched_again(tmp_path: Path) -> None:
    store = BlockCache(tmp_path, 1_000_000)
    store.read([span(0, 10)])
    (path,) = tmp_path.glob("*/*")
    path.write_bytes(b"half")
    assert store.read([span(0, 1000)]) == [DATA[:1000]]


def test_a_full_disk_only_ends_the_keeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(block_cache, "_write", full)
    store = BlockCache(tmp_path, 1_000_000)
    assert store.read([span(0, 2500)]) == [DATA[:2500]]
    assert used(tmp_path) == 0


def _reader(directory: Path, seed: int) -> int:
    store = BlockCache(directory, 30_000)
    rng = np.random.default_rng(seed)
    wrong = 0
    for start in rng.integers(0, 99_000, 150):
        wrong += store.read([span(int(start), 900)]) != [DATA[start : start + 900]]
        assert used(directory) <= 30_000
    return wrong


@pytest.mark.multiprocess
def test_processes_share_one_cache(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.starmap(_reader, [(tmp_path, seed) for seed in range(4)]) == [0] * 4
