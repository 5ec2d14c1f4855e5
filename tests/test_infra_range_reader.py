"""Ranged reads from a storage that fails: read again, from where it broke, or give up with one line."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from infra.storage import filesystem, range_reader
from infra.storage.range_reader import ByteRange, PrefetchReader

DATA = np.random.default_rng(0).bytes(50_000)
URL = "memory://ranges-test/file"


class Flaky:
    """Stands in for a file system's `cat_ranges` and fails as a seeded generator says."""

    def __init__(self, real: Any, seed: int, share: float) -> None:
        self.real, self.rng, self.share = real, np.random.default_rng(seed), share
        self.asked: Counter[tuple[int, int]] = Counter()

    def __call__(self, paths: list[str], starts: list[int], ends: list[int], on_error: str) -> list[Any]:
        answers = self.real(paths, starts, ends, on_error=on_error)
        for at, (start, end) in enumerate(zip(starts, ends, strict=True)):
            self.asked[start, end] += 1
            if isinstance(answers[at], bytes) and self.rng.random() < self.share:
                broken = answers[at][: len(answers[at]) // 2]
                answers[at] = [OSError("reset"), TimeoutError(), broken][self.rng.integers(3)]
        return answers


@pytest.fixture(autouse=True)
def _remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(filesystem, "_BACKOFF", (1e-6, 1e-6))
    monkeypatch.setattr(range_reader, "_PIECE", 1000)
    files = fsspec.filesystem("memory")
    files.pipe_file("/ranges-test/file", DATA)
    yield
    files.rm("/ranges-test", recursive=True)


def flaky(patch: pytest.MonkeyPatch, seed: int, share: float) -> Flaky:
    files = fsspec.filesystem("memory")
    found = Flaky(type(files).cat_ranges.__get__(files), seed, share)
    patch.setattr(files, "cat_ranges", found, raising=False)
    return found


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 50_000), st.integers(0, 5000)), max_size=5), st.integers(0, 1000))
def test_a_flaky_storage_gives_the_same_bytes(places: list[tuple[int, int]], seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        flaky(patch, seed, 0.08)  # six failures in a row are given up
        found = range_reader.read_ranges([ByteRange(URL, *place) for place in places])
    assert found == [DATA[start : start + size] for start, size in places]


def test_what_has_come_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = flaky(monkeypatch, 1, 0.3).asked
    assert range_reader.read_ranges([ByteRange(URL, 0, 20_000)]) == [DATA[:20_000]]
    whole = sum(end - start for start, end in asked.elements())
    assert 20_000 < whole < 32_000
    assert any(start % 1000 for start, _ in asked)  # a piece that broke off was gone on with


def test_the_end_of_a_file_is_no_failure() -> None:
    assert range_reader.read_ranges([ByteRange(URL, 49_990, 100), ByteRange(URL, 60_000, 5)]) == [DATA[49_990:], b""]


def test_a_storage_that_stays_down_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    flaky(monkeypatch, 0, 1.1)
    with pytest.raises(UserError, match=f"{URL}: the storage failed 6 times"):
        range_reader.read_ranges([ByteRange(URL, 0, 100)])


def test_a_missing_file_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = flaky(monkeypatch, 0, 0.0).asked
    with pytest.raises(UserError, match="not found"):
        range_reader.read_ranges([ByteRange("memory://ranges-test/none", 0, 100)])
    assert asked.total() == 1


def test_local_files_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    assert range_reader.read_ranges([ByteRange(str(tmp_path / "file"), 7, 20)]) == [DATA[7:27]]


@given(st.integers(1, 7000))
@settings(max_examples=20)
def test_a_file_read_through_is_the_file(size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        flaky(patch, size, 0.1)
        with io.BufferedReader(PrefetchReader(URL, len(DATA)), size) as file:
            assert file.read() == DATA
