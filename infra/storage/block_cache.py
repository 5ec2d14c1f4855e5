"""A bounded cache of parts of remote files on a local disk, shared by all processes of a machine."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from infra.storage import range_reader
from infra.storage.atomic import atomic_write
from infra.storage.range_reader import ByteRange

BLOCK = 4 << 20  # bytes
_FETCHES = 8  # blocks that one process fetches at a time
_LOCKS = 64
_FILLED = 7 / 8  # of the bound: what is left after making room

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedRange:
    """`size` bytes from `start` of a file of `file_bytes` whose content is known by its `identity`, a hash."""

    url: str
    identity: str
    file_bytes: int
    start: int
    size: int

    def blocks(self) -> range:
        return range(self.start // BLOCK, -(-(self.start + self.size) // BLOCK))


class BlockCache:
    """Blocks of files, the least recently used removed first.

    Several processes may use one directory: a block is fetched by one while the others wait for it, written under
    another name and renamed, and the total never exceeds the bound.

    Args:
        directory: where blocks are kept; nothing else may lie there.
        max_bytes: bound of their total size.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        directory.mkdir(parents=True, exist_ok=True)

    def read(self, spans: Sequence[CachedRange]) -> list[bytes]:
        """The bytes of each span; fewer where its file ends before."""
        parts = [(at, span, number) for at, span in enumerate(spans) for number in span.blocks()]
        found = [b""] * len(spans)
        with ThreadPoolExecutor(_FETCHES) as pool:
            for (at, _, _), data in zip(parts, pool.map(lambda part: self._part(*part[1:]), parts), strict=True):
                found[at] += data
        return found

    def evict(self, spans: Sequence[CachedRange]) -> None:
        """Remove the blocks of some spans."""
        for span in spans:
            for number in span.blocks():
                self._path(span, number).unlink(missing_ok=True)

    def _path(self, span: CachedRange, number: int) -> Path:
        return self.directory / span.identity[:2] / f"{span.identity}-{number:06d}"

    def _part(self, span: CachedRange, number: int) -> bytes:
        """What a span has of a block."""
        path, first = self._path(span, number), number * BLOCK
        whole = min(BLOCK, span.file_bytes - first)
        start, end = max(span.start - first, 0), min(span.start + span.size - first, whole)
        found = _held(path, whole, start, end)
        if found is None:
            with self._alone(path.name):
                found = _held(path, whole, start, end)  # another process may have fetched it meanwhile
                if found is None:
                    (block,) = range_reader.read_ranges([ByteRange(span.url, first, whole)])
                    if len(block) == whole:
                        self._keep(path, block)
                    found = block[start:end]
        return found

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Hold the lock of one block; blocks share a few lock files."""
        with (self.directory / f"lock-{zlib.crc32(name.encode()) % _LOCKS}").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _keep(self, path: Path, data: bytes) -> None:
        """Write a block, after making room for it."""
        if len(data) > self.max_bytes * (1 - _FILLED):
            return
        try:
            with (self.directory / "used").open("a+") as used:
                fcntl.flock(used, fcntl.LOCK_EX)
                used.seek(0)
                count = used.read()
                total = int(count) if count.isdecimal() else self.max_bytes  # nobody has counted yet: look
                total += len(data)
                if total > self.max_bytes:
                    total = self._sweep() + len(data)
                used.truncate(0)
                used.write(str(total))
                used.flush()  # counted before it is there, so that a death in between costs room and not the bound
                path.parent.mkdir(exist_ok=True)
                _write(path, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            _log.warning("%s: the disk is full; reading on without keeping more", self.directory)

    def _sweep(self) -> int:
        """Remove what was not used for longest, and what dead writers left; return the bytes that stay."""
        total = 0
        for _, size, path in sorted(self._entries(), reverse=True):
            if total + size > self.max_bytes * _FILLED:
                path.unlink(missing_ok=True)
            else:
                total += size
        return total

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        for folder in self.directory.iterdir():
            if folder.is_dir():
                for entry in os.scandir(folder):
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        yield status.st_mtime, status.st_size, Path(entry.path)


def _held(path: Path, whole: int, start: int, end: int) -> bytes | None:
    """Part of a block that is kept whole, marked as used now; None where there is none."""
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != whole:
                return None
            os.utime(file.fileno())
            file.seek(start)
            return file.read(end - start)
    except FileNotFoundError:
        return None


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as partial:
        partial.write_bytes(data)
