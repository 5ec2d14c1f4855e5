"""Corpora: WebDataset shards with an index that makes every sample one ranged read away."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.artifacts import Artifact, open_artifact
from infra.errors import UserError
from infra.hashing import hash_file

INDEX = "index.parquet"
SHARDS = "shards.json"
REJECTED = "rejected.parquet"

MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),  # row of shards.json
        ("image", MEMBER),
        ("members", pa.list_(MEMBER)),  # every other member of the sample
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),  # of the image's bytes
        ("label", pa.int64()),  # null where there is none
        ("caption", pa.string()),
    ]
)
REJECTED_SCHEMA = pa.schema([("key", pa.string()), ("reason", pa.string()), ("bytes", pa.int64())])


@dataclass(frozen=True)
class Shard:
    """A tar file of a corpus: relative to the artifact where Fovea wrote it, absolute where it found it."""

    url: str
    bytes: int
    sha256: str


@dataclass
class Corpus:
    """Samples of a corpus artifact, read by row."""

    artifact: Artifact
    shards: list[Shard]
    table: pa.Table
    _descriptors: dict[int, int] = field(default_factory=dict, repr=False)
    _owner: int = 0

    @classmethod
    def open(cls, url: str) -> Corpus:
        """Open the corpus at a URL.

        Raises:
            UserError: there is no corpus.
        """
        artifact = open_artifact(url, "corpus")
        shards = [Shard(**entry) for entry in artifact.read_json(SHARDS)]
        table = pq.read_table(artifact.local_file(INDEX), schema=INDEX_SCHEMA)
        return cls(artifact, shards, table)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}}

    @cached_property
    def keys(self) -> list[str]:
        return self.table["key"].to_pylist()

    @cached_property
    def labels(self) -> np.ndarray:
        """Class of each sample, int64 `[n]`.

        Raises:
            UserError: some sample has none.
        """
        if self.table["label"].null_count:
            raise UserError(f"{self.artifact.url}: has samples without a label; ingest a folder of class folders")
        return np.array(self.table["label"].to_numpy())

    @cached_property
    def captions(self) -> pa.ChunkedArray:
        """Caption of each sample, not copied from the index.

        Raises:
            UserError: some sample has none.
        """
        if self.table["caption"].null_count:
            raise UserError(f"{self.artifact.url}: has samples without a caption; ingest shards with .txt members")
        return self.table["caption"]

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their numbers; empty where they have none."""
        return list(self.artifact.metrics.get("classes", []))

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        image = self.table["image"].combine_chunks()
        return (
            self.table["shard"].to_numpy(),
            image.field("offset").to_numpy(),
            image.field("size").to_numpy(),
        )

    def shard_url(self, shard: int) -> str:
        return storage.join(self.artifact.url, self.shards[shard].url)

    def read_image(self, row: int) -> bytes:
        """The encoded image of one row."""
        shard, offset, size = (int(column[row]) for column in self._places)
        return self.read_range(shard, offset, size)

    def read_range(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset`.

        Raises:
            UserError: the shard is gone or shorter than the index says.
        """
        url = self.shard_url(shard)
        if storage.is_local(url):
            data = os.pread(self._descriptor(shard, url), size, offset)
        else:
            with storage.readable_errors(url):
                files, path = storage.filesystem(url)
                data = files.cat_file(path, start=offset, end=offset + size)
        if len(data) != size:
            raise UserError(f"{url}: shorter than the index says; it changed after ingest, so ingest it again")
        return data

    def _descriptor(self, shard: int, url: str) -> int:
        if self._owner != os.getpid():  # a forked worker opens its own files
            self._descriptors, self._owner = {}, os.getpid()
        if shard not in self._descriptors:
            with storage.readable_errors(url):
                self._descriptors[shard] = os.open(storage.local_path(url), os.O_RDONLY)
        return self._descriptors[shard]


class CorpusWriter:
    """Writes samples into numbered shards, byte for byte the same for the same samples.

    Args:
        directory: the artifact's directory.
        shard_bytes: a shard is closed once it holds this much.
    """

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self.directory = directory
        self.shard_bytes = shard_bytes
        self.rows: list[dict[str, Any]] = []
        self.shards: list[Shard] = []
        self._buffer: io.BufferedWriter | None = None

    def add(self, key: str, members: dict[str, bytes], image: str, row: dict[str, Any]) -> None:
        """Append one sample.

        Args:
            key: its key, unique in the corpus.
            members: {extension: bytes}.
            image: the extension of the member that is the image.
            row: the index's other columns (width, height, sha256, label, caption).
        """
        if self._buffer is None or self._tar.tarstream.offset >= self.shard_bytes:
            self._open()
        places = {}
        for extension, data in members.items():
            self._tar.write({"__key__": key, extension: data})
            padded = -(-len(data) // 512) * 512
            places[extension] = {
                "name": f"{key}.{extension}",
                "offset": self._tar.tarstream.offset - padded,
                "size": len(data),
            }
        self.rows.append(
            {
                "key": key,
                "shard": len(self.shards),
                "image": places.pop(image),
                "members": list(places.values()),
                **row,
            }
        )

    def copy(self, corpus: Corpus, row: int) -> None:
        """Append a sample of another corpus, with its bytes, metadata and key."""
        entry = corpus.table.slice(row, 1).to_pylist()[0]
        places = {_extension(each["name"]): each for each in (entry["image"], *entry["members"])}
        members = {
            extension: corpus.read_range(entry["shard"], place["offset"], place["size"])
            for extension, place in places.items()
        }
        image = members[_extension(entry["image"]["name"])]
        if hashlib.sha256(image).hexdigest() != entry["sha256"]:
            raise UserError(f"{corpus.shard_url(entry['shard'])}: sample {entry['key']} changed; ingest it again")
        columns = {name: entry[name] for name in ("width", "height", "sha256", "label", "caption")}
        self.add(entry["key"], members, _extension(entry["image"]["name"]), columns)

    def _open(self) -> None:
        import webdataset as wds

        self._close()
        path = self._path(len(self.shards))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._buffer = path.open("wb")
        self._tar = wds.TarWriter(self._buffer, encoder=False, mtime=0.0, user="fovea", group="fovea")

    def _path(self, shard: int) -> Path:
        return self.directory / "shards" / f"{shard:06d}.tar"

    def _close(self) -> None:
        if self._buffer is None:
            return
        self._tar.close()
        self._buffer.close()
        self._buffer = None
        path = self._path(len(self.shards))
        self.shards.append(Shard(path.relative_to(self.directory).as_posix(), path.stat().st_size, hash_file(path)))

    def finish(self, rejected: Sequence[dict[str, Any]] = ()) -> None:
        """Close the last shard and write the index."""
        self._close()
        write_index(self.directory, self.rows, self.shards, rejected)


def _extension(name: str) -> str:
    """What follows the first dot of a member's base name, as in WebDataset."""
    return PurePosixPath(name).name.partition(".")[2] or "bin"


def write_index(
    directory: Path, rows: Iterable[dict[str, Any]], shards: Iterable[Shard], rejected: Iterable[dict[str, Any]]
) -> None:
    """Write what makes a directory a corpus: index, shard list and the list of what was rejected."""
    pq.write_table(pa.Table.from_pylist(list(rows), schema=INDEX_SCHEMA), directory / INDEX)
    pq.write_table(pa.Table.from_pylist(list(rejected), schema=REJECTED_SCHEMA), directory / REJECTED)
    (directory / SHARDS).write_text(json.dumps([vars(shard) for shard in shards], indent=1))
