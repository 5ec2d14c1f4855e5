"""Raw images as samples: from folders, or from tar shards that anybody wrote. Nothing is unpacked to disk."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import IO, Any

from braceexpand import braceexpand

from curation.tars import SUFFIXES, Broken, Decompressed
from infra import ranges, storage
from infra.errors import UserError
from infra.ranges import Range, SequentialFile

# Members that describe a sample; anything else may turn out to be its image.
_SIDECARS = {"txt", "json", "cls", "caption", "npy", "pkl", "pickle", "pth", "pyd", "ten"}
_IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2"}
_READ = 1 << 20
_STAMPS = ("ETag", "etag", "LastModified", "mtime_ns", "ctime_ns", "ino", "mtime")
_IMG2DATASET = re.compile(r"\d+_stats\.json")
_TOGETHER = 32  # groups of loose files that are asked for at once


@dataclass(frozen=True)
class Member:
    """One file of a sample."""

    name: str
    extension: str
    size: int
    data: bytes | None
    """None where it is larger than was asked for"""
    offset: int | None = None
    """Its place in a plain tar"""


@dataclass
class Sample:
    """Files that share a key."""

    key: str
    members: list[Member] = field(default_factory=list)
    folder_class: str | None = None

    def image(self) -> Member | None:
        """The member that is, or claims to be, the image: one with an image's extension, or the shortest other one that
        is no sidecar."""
        candidates = [each for each in self.members if each.extension.lower() not in _SIDECARS]
        return min(
            candidates,
            key=lambda each: (each.extension.lower() not in _IMAGES, each.extension.count("."), each.extension),
            default=None,
        )

    def text(self, extension: str) -> str | None:
        """The content of a sidecar as text; None where there is none or it is not UTF-8."""
        for member in self.members:
            if member.extension.lower() == extension and member.data is not None:
                try:
                    return member.data.decode()
                except UnicodeDecodeError:
                    return None
        return None

    def extensions(self) -> list[str]:
        return [member.extension for member in self.members]


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, before it is read."""

    name: str
    url: str
    bytes: int
    stamp: str | None
    """What changes when the file does: its entity tag, or its times and inode; None where nobody says"""
    regular: bool = True
    """Whether it has bytes at all: pipes, devices and links to nowhere have none"""


class BrokenShard(Exception):
    """A shard that cannot be read to its end. What came before was yielded."""


@dataclass(frozen=True)
class Unit:
    """A piece of a source that is read on its own: a shard, or a run of loose files."""

    name: str
    files: Sequence[SourceFile]
    classes: bool = True
    """Whether folders of loose files are classes"""

    @property
    def is_shard(self) -> bool:
        return self.name.endswith(SUFFIXES)

    @property
    def in_place(self) -> bool:
        """Whether samples can be read where they are, so that nothing need be copied."""
        return self.name.endswith(".tar")

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def samples(self, most: int, digest: Any) -> Iterator[Sample]:
        """Samples in a fixed order; `digest` is fed the content.

        Args:
            most: files of more bytes are named but not kept.
            digest: a hashlib object.

        Raises:
            BrokenShard: the shard cannot be read to its end.
        """
        return self._shard_samples(most, digest) if self.is_shard else self._file_samples(most, digest)

    def _shard_samples(self, most: int, digest: Any) -> Iterator[Sample]:
        (file,) = self.files
        current: Sample | None = None
        with _open(file) as raw:
            hashed = io.BufferedReader(_Hashing(raw, digest), _READ)
            archive = Decompressed(hashed, file.name)
            try:
                for member in archive.members(most):
                    key, extension = split_name(member.name)
                    if current is None or current.key != key or extension in current.extensions():
                        if current is not None:
                            yield current
                        current = Sample(key)
                    offset = member.offset if self.in_place else None
                    current.members.append(Member(member.name, extension, member.size, member.data, offset))
            except Broken as error:
                while hashed.read(_READ):  # the digest is of the whole file
                    pass
                if current is not None:
                    yield current
                raise BrokenShard(str(error)) from None
        if current is not None:
            yield current

    def _file_samples(self, most: int, digest: Any) -> Iterator[Sample]:
        groups = list(_groups(self.files).items())
        for first in range(0, len(groups), _TOGETHER):
            together = groups[first : first + _TOGETHER]
            contents = _contents([file for _, files in together for file in files], most, digest)
            for stem, files in together:
                for sample in _split(stem, files, contents):
                    yield sample if self.classes else replace(sample, folder_class=None)


class _Hashing(io.RawIOBase):
    def __init__(self, raw: IO[bytes], digest: Any) -> None:
        self._raw, self._digest = raw, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)  # type: ignore[attr-defined]
        self._digest.update(memoryview(buffer)[:count])
        return count


def _open(file: SourceFile) -> IO[bytes]:
    if storage.is_local(file.url):
        with storage.readable_errors(file.url):
            return storage.local_path(file.url).open("rb", buffering=0)
    return SequentialFile(file.url, file.bytes)  # type: ignore[return-value]


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: split at the first dot of its base name, as in WebDataset.

    WebDataset does not write extensions that begin with an underscore.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    key = (folder + slash + stem) if dot and stem else name
    return key.lstrip("./"), (extension.lstrip("_") if stem else "") or "bin"


def _groups(files: Sequence[SourceFile]) -> dict[str, list[SourceFile]]:
    """Loose files by the name they share but for its last extension."""
    groups: dict[str, list[SourceFile]] = {}
    for file in files:
        path = PurePosixPath(file.name)
        groups.setdefault(str(path.with_name(path.stem)), []).append(file)
    return groups


def _split(stem: str, files: list[SourceFile], contents: dict[str, bytes | None]) -> Iterator[Sample]:
    """One sample an image: of several images of one name, each keeps its extension in its key."""
    images = [file for file in files if _extension(file) not in _SIDECARS]
    described = {_extension(file): file for file in reversed(files) if _extension(file) in _SIDECARS}
    sidecars = list(described.values())
    candidates: list[SourceFile | None] = [*images] or [None]
    parents = PurePosixPath(stem).parts[:-1]
    for image in candidates:
        chosen = ([image] if image else []) + sidecars
        members = [Member(each.name, _extension(each), each.bytes, contents[each.name]) for each in chosen]
        key = _loose_key(stem, image if len(images) > 1 else None)
        yield Sample(key, members, folder_class=parents[0] if parents else None)
    for file in files:
        if file not in images and file not in sidecars:  # `a.txt` beside `a.TXT`
            yield Sample(file.name, [Member(file.name, _extension(file), file.bytes, contents[file.name])])


def _loose_key(stem: str, image: SourceFile | None) -> str:
    """A key without dots in its last part, which would end it in a tar; names that are changed keep apart by a hash."""
    path = PurePosixPath(stem)
    name = path.name if image is None else PurePosixPath(image.name).name
    plain = name.replace(".", "_")
    mark = f"-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}" if plain != name else ""
    return str(path.with_name(plain + mark))


def _extension(file: SourceFile) -> str:
    return PurePosixPath(file.name).suffix.removeprefix(".").lower() or "bin"


def _contents(files: list[SourceFile], most: int, digest: Any) -> dict[str, bytes | None]:
    """The content of loose files by name; None where one is larger than `most`."""
    small = [file for file in files if file.bytes <= most and file.regular]
    read = dict(zip(small, ranges.read([Range(file.url, 0, file.bytes) for file in small]), strict=True))
    for file in files:
        digest.update(f"{file.name}\0{file.bytes}\0".encode("utf-8", "surrogateescape"))
        for piece in _stream(file) if file not in read and file.regular else [read.get(file, b"")]:
            digest.update(piece)
    return {file.name: read.get(file) if file.regular else b"" for file in files}


def _stream(file: SourceFile) -> Iterator[bytes]:
    with _open(file) as raw:
        while piece := raw.read(_READ):
            yield piece


def find_units(url: str, unit_bytes: int) -> list[Unit]:
    """What a URL stands for, in the order of names: tar shards, or loose files in runs of about `unit_bytes`.

    Raises:
        UserError: nothing is there, or shards and loose images together.
    """
    try:
        url.encode()
    except UnicodeEncodeError:
        raise UserError(f"{url!r}: a name that is no text; rename the folder") from None
    shards = _shard_urls(url)
    if shards:
        return [Unit(name, [_source_file(name, each, storage.details(each))]) for name, each in sorted(shards.items())]
    found = {name: info for name, info in storage.list_files(url).items() if not _hidden(name)}
    downloaded = any(_IMG2DATASET.fullmatch(name) for name in found)
    if downloaded:  # its own files are no images, and its folders no classes
        found = {name: info for name, info in found.items() if not name.endswith(("_stats.json", ".parquet"))}
    inside = [name for name in found if name.endswith(SUFFIXES) and found[name]["type"] == "file"]
    loose = [name for name in found if PurePosixPath(name).suffix.removeprefix(".").lower() in _IMAGES]
    if inside and loose:
        raise UserError(f"{url}: holds shards ({inside[0]}) and loose images ({loose[0]}); ingest them apart")
    if not found:
        raise UserError(f"{url}: no files here; give a folder of images or tar shards")
    files = [_source_file(name, storage.join(url, name), found[name]) for name in (inside or found)]
    if inside:
        return [Unit(file.name, [file]) for file in files]
    return [replace(run, classes=not downloaded) for run in _runs(files, unit_bytes)]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)


def _runs(files: list[SourceFile], unit_bytes: int) -> Iterator[Unit]:
    """Consecutive groups of one stem, cut where a run has become large enough."""
    run: list[SourceFile] = []
    number = size = 0
    for group in _groups(files).values():
        run += group
        size += sum(file.bytes for file in group)
        if size >= unit_bytes:
            yield Unit(f"files-{number:06d}", run)
            run, number, size = [], number + 1, 0
    if run:
        yield Unit(f"files-{number:06d}", run)


def _source_file(name: str, url: str, info: dict[str, Any]) -> SourceFile:
    stamps = [str(info[each]) for each in _STAMPS if info.get(each) is not None]
    return SourceFile(name, url, int(info["size"]), "-".join(stamps) or None, info["type"] == "file")


def _shard_urls(url: str) -> dict[str, str]:
    """Tar shards that a URL names one by one: {name: URL}; empty where it is a folder."""
    try:
        expanded = list(braceexpand(url)) if "{" in url else [url]
    except ValueError:
        raise UserError(f"{url}: has a brace without its partner; mend the range, {{000..999}} say") from None
    if len(expanded) == 1 and "*" in url:
        files, path = storage.filesystem(url)
        with storage.readable_errors(url):
            expanded = [str(files.unstrip_protocol(each)) for each in files.glob(path)]
        if not expanded:
            raise UserError(f"{url}: matches no file; mend the pattern")
    if expanded == [url] and storage.is_local_folder(url):
        return {}
    if all(each.endswith(SUFFIXES) for each in expanded):
        names = {PurePosixPath(each).name: each for each in expanded}
        if len(names) < len(expanded):
            raise UserError(f"{url}: stands for several shards of one name; ingest their folder as a whole")
        return names
    if len(expanded) > 1:
        raise UserError(f"{url}: stands for files that are not tar shards; give {', '.join(SUFFIXES)} files")
    return {}
