"""Raw images as samples: from folders, or from tar shards that anybody wrote. Nothing is unpacked to disk."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Protocol

from braceexpand import braceexpand
from webdataset.tariterators import base_plus_ext

from infra import storage
from infra.artifacts import Input
from infra.errors import UserError
from infra.hashing import hash_json, hash_url

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# Members that describe a sample; anything else may turn out to be its image.
_SIDECARS = {"txt", "json", "cls", "caption"}


@dataclass(frozen=True)
class Member:
    """One file of a sample. `offset` is its place in a plain tar, None where it has none."""

    name: str
    extension: str
    data: bytes
    offset: int | None = None


@dataclass
class Sample:
    """Files that share a key."""

    key: str
    shard: int
    members: list[Member] = field(default_factory=list)
    folder_class: str | None = None

    def image(self) -> Member | None:
        """The member that is, or claims to be, the image: the one with the shortest extension that is no sidecar."""
        candidates = [each for each in self.members if each.extension.lower() not in _SIDECARS]
        return min(candidates, key=lambda each: (each.extension.count("."), each.extension), default=None)

    def text(self, extension: str) -> str | None:
        """The content of a sidecar as text; None where there is none or it is not UTF-8."""
        for member in self.members:
            if member.extension.lower() == extension:
                try:
                    return member.data.decode()
                except UnicodeDecodeError:
                    return None
        return None


@dataclass(frozen=True)
class SourceFile:
    """One file of a source, with its content's hash."""

    name: str
    url: str
    bytes: int
    sha256: str


class BrokenShard(Exception):
    """A shard that cannot be read to its end. What came before was yielded."""

    def __init__(self, shard: SourceFile) -> None:
        super().__init__(shard.name)
        self.shard = shard


class Source(Protocol):
    """Something `ingest` can read."""

    @property
    def files(self) -> list[SourceFile]:
        """Every file that is read."""

    @property
    def in_place(self) -> bool:
        """Whether samples can be read where they are, so that nothing need be copied."""

    def samples(self) -> Iterator[Sample | BrokenShard]:
        """Samples in a fixed order; a broken shard is reported in its place and the next one follows."""


def open_source(url: str) -> Source:
    """Folder or shards, by what is there.

    Raises:
        UserError: nothing is there.
    """
    shards = _shard_urls(url)
    if shards:
        return ShardSource(_fingerprints(shards))
    names = [name for name in storage.list_files(url) if not PurePosixPath(name).name.startswith(".")]
    if not names:
        raise UserError(f"{url}: no files here; give a folder of images or tar shards")
    return FolderSource(_fingerprints({name: storage.join(url, name) for name in names}))


def fingerprint(source: Source, url: str) -> Input:
    """The source as an artifact's input: its id is the hash of names and contents, wherever it lies."""
    return Input(id=hash_json([[each.name, each.sha256] for each in source.files]), url=url)


def _fingerprints(urls: dict[str, str]) -> list[SourceFile]:
    return [SourceFile(name, url, *hash_url(url)) for name, url in sorted(urls.items())]


def _shard_urls(url: str) -> dict[str, str]:
    """Tar shards that a URL stands for: {name: URL}; empty where it is a folder of something else."""
    expanded = list(braceexpand(url)) if "{" in url else [url]
    if len(expanded) == 1 and "*" in url:
        files, path = storage.filesystem(url)
        with storage.readable_errors(url):
            expanded = [str(files.unstrip_protocol(each)) for each in files.glob(path)]
        if not expanded:
            raise UserError(f"{url}: matches no file; mend the pattern")
    if all(each.endswith(SHARD_SUFFIXES) for each in expanded):
        names = {PurePosixPath(each).name: each for each in expanded}
        if len(names) < len(expanded):
            raise UserError(f"{url}: stands for several shards of one name; ingest their folders one by one")
        return names
    if len(expanded) > 1:
        raise UserError(f"{url}: stands for files that are not tar shards; give .tar, .tar.gz or .tgz files")
    inside = [name for name in storage.list_files(url) if name.endswith(SHARD_SUFFIXES) and "/" not in name]
    return {name: storage.join(url, name) for name in inside}


@dataclass(frozen=True)
class FolderSource:
    """A folder of images with optional sidecars of the same name (`a.jpg`, `a.txt`)."""

    files: list[SourceFile]

    @property
    def in_place(self) -> bool:
        return False

    def samples(self) -> Iterator[Sample | BrokenShard]:
        groups: dict[str, list[SourceFile]] = {}
        for file in self.files:
            path = PurePosixPath(file.name)
            stem = str(path.with_name(path.stem.replace(".", "_")))
            groups.setdefault(stem, []).append(file)
        for stem, files in groups.items():
            yield from self._split(stem, files)

    def _split(self, stem: str, files: list[SourceFile]) -> Iterator[Sample]:
        """One sample an image: of several images of one name, each keeps its extension in its key."""
        extensions = {file.name: PurePosixPath(file.name).suffix.removeprefix(".").lower() for file in files}
        images = [file for file in files if extensions[file.name] not in _SIDECARS]
        sidecars = [file for file in files if extensions[file.name] in _SIDECARS]
        candidates: list[SourceFile | None] = [*images] or [None]
        for image in candidates:
            key = stem if len(images) < 2 or image is None else f"{stem}_{extensions[image.name]}"
            chosen = ([image] if image else []) + sidecars
            members = [
                Member(file.name, extensions[file.name] or "bin", storage.read_bytes(file.url)) for file in chosen
            ]
            parents = PurePosixPath(stem).parts[:-1]
            yield Sample(key, 0, members, folder_class=parents[0] if parents else None)


@dataclass(frozen=True)
class ShardSource:
    """WebDataset shards: tar files whose members share a key up to the first dot of their base name."""

    files: list[SourceFile]

    @property
    def in_place(self) -> bool:
        return all(file.name.endswith(".tar") for file in self.files)

    def samples(self) -> Iterator[Sample | BrokenShard]:
        for number, shard in enumerate(self.files):
            yield from self._read(number, shard)

    def _read(self, number: int, shard: SourceFile) -> Iterator[Sample | BrokenShard]:
        current: Sample | None = None
        try:
            for member in _tar_members(shard):
                base, extension = base_plus_ext(member.name)
                if not extension:
                    base, extension = member.name, "bin"
                key = str(base).lstrip("./")
                if current is None or current.key != key:
                    if current is not None:
                        yield current
                    current = Sample(key, number)
                current.members.append(Member(member.name, extension, member.data, member.offset))
        except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error):
            if current is not None:
                yield current
            yield BrokenShard(shard)
            return
        if current is not None:
            yield current


def _tar_members(shard: SourceFile) -> Iterator[Member]:
    """Regular files of a shard, in order, read as a stream."""
    with storage.open_read(shard.url) as raw:
        plain = shard.name.endswith(".tar")
        stream = raw if plain else gzip.GzipFile(fileobj=raw)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for entry in tar:
                if not entry.isfile():
                    continue
                content = tar.extractfile(entry)
                data = content.read() if content else b""
                if len(data) != entry.size:
                    raise tarfile.ReadError("truncated member")
                yield Member(entry.name, "", data, entry.offset_data if plain else None)
            # tarfile takes an archive for finished where a header is cut short, missing or damaged.
            if plain and _block(shard, int(tar.offset)) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("no end-of-archive block")


def _block(shard: SourceFile, offset: int) -> bytes:
    with storage.readable_errors(shard.url):
        files, path = storage.filesystem(shard.url)
        return bytes(files.cat_file(path, start=offset, end=offset + tarfile.BLOCKSIZE))
