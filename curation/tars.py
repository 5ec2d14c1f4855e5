"""Tar archives that anybody wrote, read as a stream. Nothing is unpacked, and no name in them is ever a path."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_BLOCK = tarfile.BLOCKSIZE
_END = tarfile.NUL * _BLOCK
_EXTENDED_NAME = 1 << 20  # bytes that a name outside the header may have


class Broken(Exception):
    """The archive cannot be read to its end."""


@dataclass(frozen=True)
class Member:
    """One regular file of an archive."""

    name: str
    offset: int
    """Where its content begins in the archive, uncompressed."""
    size: int
    data: bytes | None
    """Its content; None where it is larger than was asked for."""


def members(stream: IO[bytes], most: int) -> Iterator[Member]:
    """Regular files in order; links, folders and devices are passed over.

    Args:
        stream: the archive, uncompressed.
        most: content of more bytes than this is not kept.

    Raises:
        Broken: the archive ends early, a header is damaged, or there is no end mark. What came before was yielded.
    """
    place, name = 0, None
    while (block := stream.read(_BLOCK)) != _END:
        header = _header(block)
        place += _BLOCK
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = _text(_content(stream, header.size, _EXTENDED_NAME)).rstrip("\0")
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            name = _pax_name(_content(stream, header.size, _EXTENDED_NAME) or b"") or name
        else:
            data = _content(stream, header.size, most if header.isreg() else 0)
            if header.isreg():
                yield Member(name or header.name, place, header.size, data)
            if header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                name = None
        place += _padded(header.size)


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    size: int
    type: bytes

    def isreg(self) -> bool:
        return self.type in tarfile.REGULAR_TYPES


def _header(block: bytes) -> _Header:
    """What a header says: read directly where it is a plain one, by tarfile, several times slower, elsewhere."""
    try:
        if not block[345] and sum(block) - sum(block[148:156]) + 256 == int(block[148:156].strip(b"\0 "), 8):
            return _Header(_text(block[:100].rstrip(b"\0")), int(block[124:136].strip(b"\0 "), 8), block[156:157])
    except (ValueError, IndexError):
        pass  # sizes beyond 8 GiB, unusual padding, damage
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise Broken(str(error)) from None
    if header.size < 0:
        raise Broken("negative size")
    return _Header(header.name, header.size, header.type)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _content(stream: IO[bytes], size: int, most: int) -> bytes | None:
    """Read past a content and its padding; return it unless it is larger than `most`."""
    left = _padded(size)
    if size <= most:
        data = stream.read(left)
        if len(data) < size:
            raise Broken("ends within a file")
        return data[:size]
    while left:
        read = len(stream.read(min(left, 1 << 20)))
        if not read:
            raise Broken("ends within a file")
        left -= read
    return None


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "surrogateescape")


def _pax_name(records: bytes) -> str | None:
    """The `path` among pax records: lines of `length key=value`."""
    while records:
        length, _, rest = records.partition(b" ")
        if not length.isdigit() or int(length) <= len(length) + 1:
            raise Broken("damaged pax header")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"path":
            return _text(value)
        records = records[int(length) :]
    return None


class Decompressed:
    """An archive's content behind its compression, checked to the last byte.

    Args:
        raw: the file's bytes.
        name: its name, which says how it is compressed.
    """

    def __init__(self, raw: IO[bytes], name: str) -> None:
        self._stream = _opened(raw, name)

    def members(self, most: int) -> Iterator[Member]:
        """`members`, with damage to the compression reported as `Broken` too."""
        try:
            yield from members(self._stream, most)
            while self._stream.read(1 << 20):  # checksums stand at the end
                pass
        except (EOFError, gzip.BadGzipFile, zlib.error, _ArrowError) as error:
            raise Broken(str(error)) from None


class _ArrowError(Exception):
    pass


def _opened(raw: IO[bytes], name: str) -> IO[bytes]:
    if name.endswith((".gz", ".tgz")):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if name.endswith(".zst"):
        return _Zstandard(raw)  # type: ignore[return-value]
    return raw


class _Zstandard:
    def __init__(self, raw: IO[bytes]) -> None:
        import pyarrow as pa

        self._stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")

    def read(self, size: int) -> bytes:
        try:
            return bytes(self._stream.read(size))
        except OSError as error:
            raise _ArrowError(str(error)) from None
