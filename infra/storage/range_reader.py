"""Parts of files at any URL: many at once, read again where the network failed, from where it failed."""

from __future__ import annotations

import errno
import io
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from infra.errors import UserError
from infra.storage import filesystem

_PIECE = 4 << 20  # bytes that are asked for at once, and at most lost when a connection breaks

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ByteRange:
    """`size` bytes of a file from `start`."""

    url: str
    start: int
    size: int


def read_ranges(ranges: Sequence[ByteRange]) -> list[bytes]:
    """The bytes of each range; fewer than asked for only where the file ends before.

    Raises:
        UserError: a file is missing or closed to us, or the storage fails again and again.
    """
    results: list[bytes] = [b""] * len(ranges)
    remote = [at for at, each in enumerate(ranges) if not filesystem.is_local(each.url)]
    for at, each in enumerate(ranges):
        if filesystem.is_local(each.url):
            results[at] = _read_local(each)
    pieces = [(at, piece) for at in remote for piece in _pieces(ranges[at])]
    for (at, _), data in zip(pieces, _read_remote([piece for _, piece in pieces]), strict=True):
        results[at] += data
    return results


def _read_local(wanted: ByteRange) -> bytes:
    with filesystem.readable_errors(wanted.url), filesystem.local_path(wanted.url).open("rb", buffering=0) as file:
        file.seek(wanted.start)
        return file.read(wanted.size)


def _pieces(wanted: ByteRange) -> Iterator[ByteRange]:
    for start in range(wanted.start, wanted.start + wanted.size, _PIECE):
        yield ByteRange(wanted.url, start, min(_PIECE, wanted.start + wanted.size - start))


def _read_remote(pieces: list[ByteRange]) -> list[bytes]:
    """Read pieces, those that failed again after a pause; of one that broke off, the rest."""
    got = [b""] * len(pieces)
    missing = list(range(len(pieces)))
    for attempt in range(filesystem.ATTEMPTS):
        failures: list[Exception] = []
        for at, answer in zip(missing, _request([_remaining(pieces[at], got[at]) for at in missing]), strict=True):
            if isinstance(answer, bytes):
                got[at] += _require_at_most(pieces[at].size - len(got[at]), answer, pieces[at].url)
            else:
                failures.append(answer)
        missing = [at for at in missing if len(got[at]) < pieces[at].size]
        if missing and (not failures or any(_is_past_end(each) for each in failures)):
            missing = [at for at in missing if pieces[at].start + len(got[at]) < _file_size(pieces[at].url)]
        if not missing:
            return got
        _log.info("%s: reading %d parts again after %r", pieces[missing[0]].url, len(missing), failures[:1])
        filesystem.sleep_before_retry(attempt)
    raise filesystem.retries_exhausted(
        pieces[missing[0]].url, failures[0] if failures else EOFError("answers are cut short")
    )


def _require_at_most(size: int, answer: bytes, url: str) -> bytes:
    if len(answer) > size:
        raise UserError(f"{url}: its server ignores ranges; copy the files to a disk or an object store")
    return answer


def _remaining(piece: ByteRange, got: bytes) -> ByteRange:
    return ByteRange(piece.url, piece.start + len(got), piece.size - len(got))


def _request(pieces: Sequence[ByteRange]) -> list[bytes | Exception]:
    """One request for each piece, all at once; what is beyond repair is raised."""
    answers: list[bytes | Exception] = [b""] * len(pieces)
    for root in {_root(piece.url) for piece in pieces}:
        mine = [at for at, piece in enumerate(pieces) if _root(piece.url) == root]
        files, _ = filesystem.connect(pieces[mine[0]].url)
        answers_of_root = files.cat_ranges(
            [filesystem.connect(pieces[at].url)[1] for at in mine],
            [pieces[at].start for at in mine],
            [pieces[at].start + pieces[at].size for at in mine],
            on_error="return",
        )
        for at, answer in zip(mine, answers_of_root, strict=True):
            if isinstance(answer, Exception) and not filesystem.is_transient(answer):
                with filesystem.readable_errors(pieces[at].url):
                    raise answer
            answers[at] = answer if isinstance(answer, Exception) else bytes(answer)
    return answers


def _root(url: str) -> str:
    return url.split("/", 3)[2] if "://" in url else ""


def _is_past_end(error: Exception) -> bool:
    """Whether a range may lie behind the file's end: stores answer 416, which s3fs makes an invalid argument."""
    return isinstance(error, OSError) and error.errno == errno.EINVAL


def _file_size(url: str) -> int:
    return int(filesystem.stat(url)["size"])


class PrefetchReader(io.RawIOBase):
    """A file at a URL read from front to back, one piece ahead of the reader."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__()
        self._pieces = _pieces(ByteRange(url, 0, size))
        self._pool = ThreadPoolExecutor(1)
        self._next = self._prefetch()
        self._held = memoryview(b"")

    def _prefetch(self) -> Future[list[bytes]] | None:
        piece = next(self._pieces, None)
        return None if piece is None else self._pool.submit(read_ranges, [piece])

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if not self._held and self._next is not None:
            (data,) = self._next.result()
            self._held, self._next = memoryview(data), self._prefetch()
        count = min(len(buffer), len(self._held))
        buffer[:count] = self._held[:count]
        self._held = self._held[count:]
        return count

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()
