"""Writing corpora: tar shards and the index over them, streamed to disk."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.corpus.corpus import INDEX, INDEX_SCHEMA, REJECTED, REJECTED_SCHEMA, SHARDS, Corpus, Shard
from infra.corpus.names import extension_of, is_storable
from infra.errors import UserError

_GROUP = 1 << 14  # rows of a row group


class ParquetWriter:
    """Rows appended to a parquet file, a group at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema)
        self._schema = schema
        self._waiting: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        self._waiting.append(row)
        if len(self._waiting) == _GROUP:
            self._flush()

    def add_table(self, rows: pa.Table) -> None:
        self._flush()
        self._writer.write_table(rows.cast(self._schema), row_group_size=_GROUP)

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=self._schema))
        self._waiting = []

    def close(self) -> None:
        self._flush()
        self._writer.close()


class IndexWriter:
    """What makes a directory a corpus: the index, the list of its shards and the list of what was turned away."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._index = ParquetWriter(directory / INDEX, INDEX_SCHEMA)
        self._rejected = ParquetWriter(directory / REJECTED, REJECTED_SCHEMA)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row of the index; rows of a shard follow one another."""
        self._index.add(row)

    def add_table(self, rows: pa.Table) -> None:
        """Append many rows of the index."""
        self._index.add_table(rows)

    def reject(self, row: Mapping[str, Any]) -> None:
        """Append a row (key, reason, bytes) to what was turned away."""
        self._rejected.add(row)

    def finish(self, shards: Iterable[Shard]) -> None:
        self._index.close()
        self._rejected.close()
        (self.directory / SHARDS).write_text(json.dumps([vars(shard) for shard in shards], indent=1))


class ShardWriter:
    """One tar shard (WebDataset), byte for byte the same for the same samples, hashed while it is written."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.size = 0
        """Bytes so far."""
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._names: set[str] = set()

    def add(self, key: str, members: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        """Append a sample's members, {extension: bytes}; return where each lies: its name, offset and size.

        Raises:
            ValueError: readers would not find a member by its key and extension again.
        """
        places = {}
        for extension, data in members.items():
            name = f"{key}.{extension}"
            self._require_readable(key, extension, name)
            self._write(_header(name, len(data)))
            places[extension] = {"name": name, "offset": self.size, "size": len(data)}
            self._write(data)
            self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return places

    def _require_readable(self, key: str, extension: str, name: str) -> None:
        if not is_storable(key) or "." in PurePosixPath(key).name:
            raise ValueError(f"{self.path}: {key!r} is no key that a shard can hold")
        if not is_storable(name) or extension.startswith("_") or extension_of(name) != extension:
            raise ValueError(f"{self.path}: {extension!r} is no extension that readers of shards find")
        if name in self._names:
            raise ValueError(f"{self.path}: {name!r} is in the shard already")
        self._names.add(name)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def finish(self, root: Path) -> Shard:
        """Close the shard; its URL is relative to `root`."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))
        self._file.close()
        return Shard(self.path.relative_to(root).as_posix(), self.size, self._digest.hexdigest())


def _header(name: str, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.uname, entry.gname = size, 0o444, "fovea", "fovea"
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


Redact = Callable[[str, bytes], tuple[str, bytes] | None]


def _redact(members: dict[str, bytes], redact: Redact) -> tuple[dict[str, str], bool]:
    """Change members in their places; return new extensions of some, and whether any was changed."""
    renamed: dict[str, str] = {}
    changed = False
    for extension, data in list(members.items()):
        again = redact(extension, data)
        if again is None:
            continue
        new, members[extension] = again
        changed = True
        if new != extension:
            taken = {*members, *renamed.values()}
            renamed[extension] = new if new not in taken else f"{extension}.{new}"
    return renamed, changed


def _extensions(members: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Members of a sample of any corpus, the image first, by an extension for each that no other one has.

    Of a shard of others, members may share a longer name before their extensions (`img.0001.jpg`, `img.0001.txt`), or
    differ by nothing but capital letters.
    """
    image = extension_of(members[0]["name"])
    shared = image[: image.rfind(".") + 1]
    by_extension: dict[str, Mapping[str, Any]] = {}
    for each in members:
        extension = extension_of(each["name"]).removeprefix(shared).lstrip("_") or "bin"
        while extension in by_extension:
            extension = f"other.{extension}"
        by_extension[extension] = each
    return by_extension


class CorpusWriter:
    """Writes samples into numbered shards and their index.

    Args:
        directory: the artifact's directory.
        shard_bytes: a shard is closed once it holds this much.
    """

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self.directory = directory
        self.shard_bytes = shard_bytes
        self.shards: list[Shard] = []
        self._index = IndexWriter(directory)
        self._shard: ShardWriter | None = None

    def add(self, key: str, members: Mapping[str, bytes], image: str, row: Mapping[str, Any]) -> None:
        """Append one sample.

        Args:
            key: its key, unique in the corpus.
            members: {extension: bytes}.
            image: the extension of the member that is the image.
            row: the index's other columns (width, height, sha256, label, caption).
        """
        if self._shard is not None and self._shard.size >= self.shard_bytes:
            self._close()
        if self._shard is None:
            self._shard = ShardWriter(shard_path(self.directory, len(self.shards)))
        places = self._shard.add(key, members)
        placed = {"image": places.pop(image), "members": list(places.values())}
        self._index.add({"key": key, "shard": len(self.shards), **placed, **row})

    def copy(self, corpus: Corpus, row: int, redact: Redact | None = None) -> bool:
        """Append a sample of another corpus, with its metadata and key; say whether a member was changed.

        Args:
            redact: gives a member anew, as extension and bytes, or None to keep it as it is.
        """
        entry = corpus.index_row(row)
        places = _extensions([entry["image"], *entry["members"]])
        members = {
            extension: corpus.read_range(entry["shard"], place["offset"], place["size"])
            for extension, place in places.items()
        }
        image = next(iter(places))
        if hashlib.sha256(members[image]).hexdigest() != entry["sha256"]:
            raise UserError(f"{corpus.shard_url(entry['shard'])}: sample {entry['key']} changed; ingest it again")
        renamed, changed = _redact(members, redact) if redact is not None else ({}, False)
        members = {renamed.get(extension, extension): data for extension, data in members.items()}
        image = renamed.get(image, image)
        columns = {name: entry[name] for name in ("width", "height", "label", "caption")}
        self.add(entry["key"], members, image, columns | {"sha256": hashlib.sha256(members[image]).hexdigest()})
        return changed

    def _close(self) -> None:
        if self._shard is not None:
            self.shards.append(self._shard.finish(self.directory))
            self._shard = None

    def finish(self) -> None:
        """Close the last shard and the index."""
        self._close()
        self._index.finish(self.shards)


def shard_path(directory: Path, number: int) -> Path:
    return directory / "shards" / f"{number:06d}.tar"
