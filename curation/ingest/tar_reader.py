"""Tar archives that anybody wrote, read as a stream. Nothing is unpacked, and no name in them is ever a path."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
_BLOCK = tarfile.BLOCKSIZE
_END = tarfile.NUL * _BLOCK
_EXTENDED = 1 << 20  # bytes that a header's extension may have
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_ABOUT_OTHERS = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)


class BrokenTarError(Exception):
    """The archive cannot be read to its end.

    Args:
        reason: one word for it, as rejections have it.
    """

    def __init__(self, message: str, reason: str = "broken_shard") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class TarMember:
    """One entry of an archive that is no folder."""

    name: str
    offset: int
    """Where its content begins in the archive, uncompressed."""
    size: int
    data: bytes | None
    """Its content; None where it is larger than was asked for."""
    unreadable: str | None = None
    """Why its content cannot be read: `link`, `special_file` or `sparse_file`."""


_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)


def iterate_members(stream: IO[bytes], most: int) -> Iterator[TarMember]:
    """Entries in order, also behind the end mark of archives that were joined; folders are passed over.

    Args:
        stream: the archive, uncompressed.
        most: content of more bytes than this is not kept.

    Raises:
        BrokenTarError: the archive ends early, a header is damaged, or there is no end mark. Members before that are
            yielded.
    """
    place = 0
    name: str | None = None
    size: int | None = None
    sparse = ended = False
    while block := stream.read(_BLOCK):
        if block == _END:
            ended = True
            place += _BLOCK
            continue
        if ended and not block.strip(tarfile.NUL):
            break  # padding to no whole block
        header, ended = _header(block), False
        place += _BLOCK
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = _text(_content(stream, header.size, _EXTENDED)).rstrip("\0")
        elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            records = _pax(_content(stream, header.size, _EXTENDED) or b"")
            path = records.get("GNU.sparse.name", records.get("path"))
            name = name if path is None else _text(path)
            size = _number(records["size"]) if "size" in records else size
            sparse = any(key.startswith("GNU.sparse.") for key in records)
        elif header.type in _ABOUT_OTHERS:
            _content(stream, header.size, 0)
        else:
            place += _sparse_map(stream, block) if header.type == tarfile.GNUTYPE_SPARSE else 0
            length = _length(header, size)
            unreadable = _unreadable(header.type, sparse)
            data = _content(stream, length, most if unreadable is None else 0)
            if not header.is_folder:
                yield TarMember(name or header.name, place, length, data if unreadable is None else None, unreadable)
            place += _padded(length)
            name = size = None
            sparse = False
            continue
        place += _padded(header.size)
    if not ended:
        raise BrokenTarError("ends without an end mark")


def _unreadable(kind: bytes, sparse: bool) -> str | None:
    """Why the content of an entry is not that of a file."""
    if kind in _LINKS:
        return "link"
    if sparse or kind == tarfile.GNUTYPE_SPARSE:
        return "sparse_file"
    return None if kind in tarfile.REGULAR_TYPES else "special_file"


def _sparse_map(stream: IO[bytes], header: bytes) -> int:
    """Read past the further blocks of an old GNU sparse file's map; return their bytes."""
    more, read = header[482], 0
    while more:
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK:
            raise BrokenTarError("ends within a header")
        more, read = block[504], read + _BLOCK
    return read


def _length(header: _Header, size: int | None) -> int:
    """Bytes that follow a header: links, folders and devices have none, whatever they say."""
    if not header.is_regular and header.type in tarfile.SUPPORTED_TYPES:
        return 0
    return header.size if size is None else size


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    size: int
    type: bytes

    @property
    def is_folder(self) -> bool:
        return self.type == tarfile.DIRTYPE or (self.type == tarfile.AREGTYPE and self.name.endswith("/"))

    @property
    def is_regular(self) -> bool:
        return self.type in tarfile.REGULAR_TYPES


def _header(block: bytes) -> _Header:
    """What a header says: read directly where it is a plain one, by tarfile, several times slower, elsewhere."""
    try:
        if not block[345] and sum(block) - sum(block[148:156]) + 256 == int(block[148:156].strip(b"\0 "), 8):
            size = int(block[124:136].strip(b"\0 "), 8)
            if size >= 0:
                return _Header(_text(block[:100].rstrip(b"\0")), size, block[156:157])
    except (ValueError, IndexError):
        pass  # sizes beyond 8 GiB, unusual padding, damage
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise BrokenTarError(str(error)) from None
    if header.size < 0:
        raise BrokenTarError("negative size")
    return _Header(header.name, header.size, header.type)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _content(stream: IO[bytes], size: int, most: int) -> bytes | None:
    """Read past a content and its padding; return it unless it is larger than `most`."""
    left = _padded(size)
    if size <= most:
        data = stream.read(left)
        if len(data) < size:
            raise BrokenTarError("ends within a file")
        return data[:size]
    while left:
        read = len(stream.read(min(left, 1 << 20)))
        if not read:
            raise BrokenTarError("ends within a file")
        left -= read
    return None


def _text(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "surrogateescape")


def _pax(records: bytes) -> dict[str, bytes]:
    """Pax records: lines of `length key=value`."""
    found = {}
    while records:
        digits, _, rest = records.partition(b" ")
        length = _number(digits)
        if length <= len(digits) + 1:
            raise BrokenTarError("damaged pax header")
        key, _, value = rest[: length - len(digits) - 2].partition(b"=")
        found[_text(key)] = value
        records = records[length:]
    return found


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 15:
        raise BrokenTarError("damaged pax header")
    return int(digits)


class DecompressedStream:
    """An archive's content behind its compression, checked to the last byte.

    Args:
        raw: the file's bytes.
        name: its name, which says how it is compressed.
    """

    def __init__(self, raw: io.BufferedReader[Any], name: str) -> None:
        self._is_misnamed = name.lower().endswith(".tar") and raw.peek(6)[:6].startswith(_COMPRESSED)
        self._stream = _open(raw, name.lower())

    def members(self, most: int) -> Iterator[TarMember]:
        """`members`, with damage to the compression reported as `BrokenTarError` too."""
        if self._is_misnamed:
            raise BrokenTarError("compressed, although its name ends in .tar", "compressed_tar")
        try:
            yield from iterate_members(self._stream, most)
            while self._stream.read(1 << 20):  # checksums stand at the end
                pass
        except (EOFError, gzip.BadGzipFile, zlib.error, _ArrowError) as error:
            raise BrokenTarError(str(error)) from None


class _ArrowError(Exception):
    pass


def _open(raw: IO[bytes], name: str) -> IO[bytes]:
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
