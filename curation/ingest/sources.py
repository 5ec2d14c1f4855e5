"""Raw images as samples: from folders, or from tar shards that anybody wrote. Nothing is unpacked to disk."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

from braceexpand import braceexpand

from curation.ingest.samples import IMAGE_SUFFIXES, Member, Sample, group_members, group_stem, split_name, stem_of
from curation.ingest.tar_reader import SUFFIXES, BrokenTarError, DecompressedStream
from infra.corpus.names import suffix_of
from infra.errors import UserError
from infra.storage import filesystem, range_reader
from infra.storage.range_reader import ByteRange, PrefetchReader

_READ = 1 << 20
_STAMPS = ("ETag", "etag", "LastModified", "mtime_ns", "ctime_ns", "ino", "mtime")
_IMG2DATASET = re.compile(r"\d+_stats\.json")
_TOGETHER = 32  # groups of loose files that are asked for at once
_CONTAINERS = (
    *(".zip", ".7z", ".rar", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.lz4", ".parquet", ".arrow", ".lance"),
    *(".lmdb", ".mdb", ".h5", ".hdf5", ".tfrecord", ".beton", ".rec", ".pdf"),
)
"""Suffixes of files that may hold images which nothing here reads."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, before it is read."""

    name: str
    url: str
    bytes: int
    stamp: str | None
    """What changes when the file does: its entity tag, or its times and inode; None where nobody says"""
    unreadable: str | None = None
    """Why it cannot be read: a link to nowhere, a pipe, a name that the storage reads as another one"""


class BrokenShardError(Exception):
    """A shard that cannot be read to its end. What came before was yielded. `reason` says why in one word."""

    def __init__(self, cause: BrokenTarError) -> None:
        super().__init__(str(cause))
        self.reason = cause.reason


@dataclass(frozen=True)
class Unit:
    """A piece of a source that is read on its own: a shard, or a run of loose files."""

    name: str
    files: Sequence[SourceFile]
    classes: bool = True
    """Whether folders of loose files are classes"""
    annotation_suffixes: tuple[str, ...] = ()
    """Of files that describe the image of their name although they claim to be images"""

    @property
    def is_shard(self) -> bool:
        return is_shard_name(self.name)

    @property
    def in_place(self) -> bool:
        """Whether samples can be read where they are, so that nothing need be copied."""
        return self.name.lower().endswith(".tar")

    @property
    def total_bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def path_of(self, member: str) -> str:
        """Where a member lies in the source."""
        return f"{self.name}/{member}" if self.is_shard else member

    def samples(self, most: int, digest: Any) -> Iterator[Sample]:
        """Samples in a fixed order; `digest` is fed the content.

        Args:
            most: files of more bytes are named but not kept.
            digest: a hashlib object.

        Raises:
            BrokenShardError: the shard cannot be read to its end.
        """
        return self._shard_samples(most, digest) if self.is_shard else self._file_samples(most, digest)

    def _shard_samples(self, most: int, digest: Any) -> Iterator[Sample]:
        (file,) = self.files
        broken: list[BrokenTarError] = []
        with _open(file) as raw:
            hashed = io.BufferedReader(_Hashing(raw, digest), _READ)
            yield from group_members(self._members(DecompressedStream(hashed, file.name), most, broken))
            while broken and hashed.read(_READ):  # the digest is of the whole file
                pass
        if broken:
            raise BrokenShardError(broken[0])

    def _members(self, archive: DecompressedStream, most: int, broken: list[BrokenTarError]) -> Iterator[Member]:
        """Members of an archive; damage ends them, and is noted."""
        try:
            for entry in archive.members(most):
                extension = split_name(entry.name)[1]
                offset = entry.offset if self.in_place else None
                annotation = extension.lower() in self.annotation_suffixes
                yield Member(entry.name, extension, entry.size, entry.data, offset, entry.unreadable, annotation)
        except BrokenTarError as error:
            broken.append(error)

    def _file_samples(self, most: int, digest: Any) -> Iterator[Sample]:
        groups = list(_groups(self.files, self.annotation_suffixes).items())
        for first in range(0, len(groups), _TOGETHER):
            together = groups[first : first + _TOGETHER]
            contents = _contents([file for _, files in together for file in files], most, digest)
            for stem, files in together:
                folder, inside, _ = stem.partition("/")
                for sample in group_stem(stem, [self._loose(file, contents) for file in files]):
                    sample.folder_class = folder if inside and self.classes else None
                    yield sample

    def _loose(self, file: SourceFile, contents: Mapping[str, bytes | None]) -> Member:
        annotation = file.name.lower().endswith(tuple(f".{suffix}" for suffix in self.annotation_suffixes))
        data = contents[file.name]
        return Member(file.name, suffix_of(file.name), file.bytes, data, None, file.unreadable, annotation)


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
    if filesystem.is_local(file.url):
        with filesystem.readable_errors(file.url):
            return filesystem.local_path(file.url).open("rb", buffering=0)
    return PrefetchReader(file.url, file.bytes)  # type: ignore[return-value]


def _groups(files: Sequence[SourceFile], annotation_suffixes: Sequence[str]) -> dict[str, list[SourceFile]]:
    """Loose files by the name they share but for its suffix."""
    groups: dict[str, list[SourceFile]] = {}
    for file in files:
        groups.setdefault(stem_of(file.name, annotation_suffixes), []).append(file)
    return groups


def _contents(files: list[SourceFile], most: int, digest: Any) -> dict[str, bytes | None]:
    """The content of loose files by name; None where one is larger than `most` or cannot be read."""
    small = [file for file in files if file.bytes <= most and file.unreadable is None]
    read = dict(
        zip(small, range_reader.read_ranges([ByteRange(file.url, 0, file.bytes) for file in small]), strict=True)
    )
    for file in files:
        digest.update(f"{file.name}\0{file.bytes}\0".encode("utf-8", "surrogateescape"))
        if file.unreadable is None:
            for piece in [read[file]] if file in read else _stream(file):
                digest.update(piece)
    return {file.name: read.get(file) for file in files}


def _stream(file: SourceFile) -> Iterator[bytes]:
    with _open(file) as raw:
        while piece := raw.read(_READ):
            yield piece


@dataclass(frozen=True)
class Source:
    """What a URL stands for."""

    units: list[Unit]
    """Tar shards, or loose files in runs, in the order of names."""
    rejected: list[tuple[str, str, int]] = field(default_factory=list)
    """Path, reason and bytes of what is there and belongs to no unit."""


def find_units(url: str, unit_bytes: int, annotation_suffixes: Sequence[str] = ()) -> Source:
    """What a URL stands for.

    Args:
        unit_bytes: about the size of a run of loose files.
        annotation_suffixes: of files that describe the image of their name although they claim to be images.

    Raises:
        UserError: nothing is there, or shards and loose images together.
    """
    try:
        url.encode()
    except UnicodeEncodeError:
        raise UserError(f"{url!r}: a name that is no text; rename the folder") from None
    suffixes = tuple(sorted((each.lower().lstrip(".") for each in annotation_suffixes), key=len, reverse=True))
    shards = _shard_urls(url)
    if shards:
        files = [_source_file(name, each, filesystem.stat(each)) for name, each in sorted(shards.items())]
        return Source([Unit(file.name, [file], annotation_suffixes=suffixes) for file in files])
    listed = filesystem.list_files(url)
    if not listed:
        raise UserError(f"{url}: no files here; give a folder of images or tar shards")
    files = [_source_file(name, filesystem.child(url, name), info) for name, info in listed.items()]
    return _classify_files(url, files, unit_bytes, suffixes)


def _classify_files(url: str, files: list[SourceFile], unit_bytes: int, suffixes: tuple[str, ...]) -> Source:
    """The files of a folder as units; what belongs to none is named with a reason."""
    rejected = {file.name: reason for file in files if (reason := _unread_reason(file)) is not None}
    left = [file for file in files if file.name not in rejected]
    shards = [file for file in left if is_shard_name(file.name)]
    loose = [file for file in left if suffix_of(file.name) in IMAGE_SUFFIXES]
    if shards and loose:
        raise UserError(f"{url}: holds shards ({shards[0].name}) and loose images ({loose[0].name}); ingest them apart")
    downloaded = any(_IMG2DATASET.fullmatch(file.name) for file in left)  # its folders are no classes
    if downloaded and (shards or loose):
        rejected |= {file.name: "img2dataset_record" for file in files if _is_record(file)}
        left = [file for file in left if file.name not in rejected]
    if shards:
        rejected |= {file.name: "outside_shards" for file in left if file not in shards}
        units = [Unit(file.name, [file], annotation_suffixes=suffixes) for file in shards]
    else:
        units = list(_split_into_runs(left, unit_bytes, not downloaded, suffixes))
    return Source(units, [(file.name, rejected[file.name], file.bytes) for file in files if file.name in rejected])


def _unread_reason(file: SourceFile) -> str | None:
    """Why a file is passed over, whatever lies beside it."""
    if any(part.startswith(".") and part not in (".", "..") for part in file.name.split("/")):
        return "hidden"
    if file.unreadable is not None:
        return file.unreadable
    return "unsupported_container" if file.name.lower().endswith(_CONTAINERS) else None


def _is_record(file: SourceFile) -> bool:
    return file.unreadable is None and file.name.endswith(("_stats.json", ".parquet"))


def is_shard_name(name: str) -> bool:
    """Whether a file's name says that it is a tar shard."""
    return name.lower().endswith(SUFFIXES)


def _split_into_runs(
    files: list[SourceFile], unit_bytes: int, classes: bool, annotation_suffixes: tuple[str, ...]
) -> Iterator[Unit]:
    """Consecutive groups of one stem, cut where a run has become large enough."""
    runs: list[list[SourceFile]] = [[]]
    size = 0
    for group in _groups(files, annotation_suffixes).values():
        if size >= unit_bytes:
            runs.append([])
            size = 0
        runs[-1] += group
        size += sum(file.bytes for file in group)
    for number, run in enumerate(runs):
        if run:
            yield Unit(f"files-{number:06d}", run, classes, annotation_suffixes)


def _source_file(name: str, url: str, info: Mapping[str, Any]) -> SourceFile:
    stamps = [str(info[each]) for each in _STAMPS if info.get(each) is not None]
    unreadable = None if info["type"] == "file" else str(info["type"])
    return SourceFile(name, url, int(info["size"] or 0), unreadable or "-".join(stamps) or None, unreadable)


def _shard_urls(url: str) -> dict[str, str]:
    """Tar shards that a URL names one by one: {name: URL}; empty where it is a folder."""
    if filesystem.is_local_folder(url):
        return {}
    try:
        expanded = list(braceexpand(url)) if "{" in url else [url]
    except ValueError:
        raise UserError(f"{url}: has a brace without its partner; correct the range, such as {{000..999}}") from None
    if len(expanded) == 1 and "*" in url:
        expanded = filesystem.glob(url)
        if not expanded:
            raise UserError(f"{url}: matches no file; fix the pattern")
    if all(is_shard_name(each) for each in expanded):
        names = {PurePosixPath(each).name: each for each in expanded}
        if len(names) < len(expanded):
            raise UserError(f"{url}: names several shards of one name; ingest their folder as a whole")
        return names
    if len(expanded) > 1:
        raise UserError(f"{url}: names files that are not tar shards; give {', '.join(SUFFIXES)} files")
    return {}
