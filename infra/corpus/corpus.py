"""Corpora: WebDataset shards with an index that makes every sample one ranged read away."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.artifacts.artifact import Artifact, cache_directory, open_artifact
from infra.corpus.arrow import index_in, sha256_prefixes
from infra.errors import UserError
from infra.storage import filesystem, range_reader
from infra.storage.atomic import atomic_write, prune_older_than
from infra.storage.block_cache import BlockCache, CachedRange
from infra.storage.range_reader import ByteRange

INDEX = "index.parquet"
SHARDS = "shards.json"
REJECTED = "rejected.parquet"
DECODING = "decoding.json"

MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),  # row of shards.json; rows of a shard follow one another
        ("image", MEMBER),
        ("members", pa.list_(MEMBER)),  # every other member of the sample
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),  # of the image's bytes
        ("label", pa.int64()),  # null where there is none
        ("caption", pa.string()),
    ]
)
REJECTED_SCHEMA = pa.schema(
    [("key", pa.string()), ("path", pa.string()), ("reason", pa.string()), ("bytes", pa.int64())]
)
ROWS = 1 << 16  # of a batch of the mapped index


@dataclass(frozen=True)
class Shard:
    """A tar file of a corpus: relative to the artifact where Fovea wrote it, absolute where it found it."""

    url: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BadImage:
    """Stands where an image should be: the reason why there is none."""

    reason: str


CHANGED = BadImage("checksum_mismatch")
"""The bytes are not those that were indexed: the shard was written anew, or is damaged."""


@dataclass
class Corpus:
    """Samples of a corpus artifact, read by row. The index is mapped from disk, not held in memory.

    Set `cache` to keep parts of remote shards on a local disk.
    """

    artifact: Artifact
    shards: list[Shard]
    cache: BlockCache | None = None
    rows: np.ndarray | None = None
    """Rows of the artifact's index that it consists of, int64, rising; None: all of them."""

    @classmethod
    def open(cls, url: str) -> Corpus:
        """Open the corpus at a URL.

        Raises:
            UserError: there is no corpus.
        """
        return cls.from_artifact(open_artifact(url, "corpus"))

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Corpus:
        return cls(artifact, [Shard(**entry) for entry in artifact.read_json(SHARDS)])

    @cached_property
    def table(self) -> pa.Table:
        """The index, in batches of `ROWS` rows."""
        whole = _mapped(self.artifact)
        return whole if self.rows is None else whole.take(pa.array(self.rows))

    def subset(self, rows: np.ndarray) -> Corpus:
        """Some of its rows, int64, rising, as a corpus of their own."""
        within = rows if self.rows is None else self.rows[rows]
        return Corpus(self.artifact, self.shards, self.cache, within)

    @cached_property
    def decoding(self) -> dict[str, Any]:
        """How its images are decoded: whether all were `decoded` when it was made, and the `bit_depth` or `window` of
        samples of more than 8 bits. Empty where it was made of decoded images that need nothing."""
        there = any(file.path == DECODING for file in self.artifact.manifest.files)
        return dict(self.artifact.read_json(DECODING)) if there else {}

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"artifact": self.artifact, "shards": self.shards, "cache": self.cache, "rows": self.rows}

    def key(self, row: int) -> str:
        return str(self.table["key"][row].as_py())

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
    def shard_ends(self) -> np.ndarray:
        """Rows after each shard, int64 `[shards]`."""
        counted = pc.value_counts(self.table["shard"])
        counts = np.zeros(len(self.shards), dtype=np.int64)
        counts[counted.field("values").to_numpy()] = counted.field("counts").to_numpy()
        return np.cumsum(counts)

    @property
    def total_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def shard_url(self, shard: int) -> str:
        return filesystem.join(self.artifact.url, self.shards[shard].url)

    def index_row(self, row: int) -> dict[str, Any]:
        """The index's columns of one row."""
        return self.table.slice(row, 1).to_pylist()[0]

    def read_image(self, row: int) -> bytes:
        """The encoded image of one row.

        Raises:
            UserError: its bytes are not those that were indexed.
        """
        (image,) = self.read_images([row])
        if isinstance(image, BadImage):
            url = self.shard_url(self._member_position(row)[0])
            raise UserError(f"{url}: sample {self.key(row)} changed after ingest; ingest it again")
        return image

    def read_images(self, rows: Sequence[int]) -> list[bytes | BadImage]:
        """The encoded images of some rows, checked against the index; `CHANGED` in the place of any other bytes.

        Raises:
            UserError: a shard is gone, or the storage fails again and again.
        """
        places = [self._member_position(row) for row in rows]
        images = self._read([place[:3] for place in places])
        wrong = [at for at, image in enumerate(images) if _sha256(image) != places[at][3]]
        if wrong and self.cache is not None:  # the damage may lie in the cache
            self.cache.evict([self._byte_range(*places[at][:3]) for at in wrong])
        if wrong:
            again = self._read([places[at][:3] for at in wrong])
            images = [again[wrong.index(at)] if at in wrong else image for at, image in enumerate(images)]
        return [
            image if at not in wrong or _sha256(image) == places[at][3] else CHANGED for at, image in enumerate(images)
        ]

    def read_range(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a shard from `offset`.

        Raises:
            UserError: the shard is gone or shorter than the index says.
        """
        (data,) = self.read_ranges([(shard, offset, size)])
        return data

    def read_ranges(self, places: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Of some (shard, offset, size) the bytes, read together.

        Raises:
            UserError: a shard is gone or shorter than the index says.
        """
        found = self._read(places)
        for (shard, _, size), data in zip(places, found, strict=True):
            if len(data) != size:
                raise UserError(f"{self.shard_url(shard)}: shorter than its index; ingest it again")
        return found

    def _read(self, places: Sequence[tuple[int, int, int]]) -> list[bytes]:
        if self.cache is not None and places and not filesystem.is_local(self.shard_url(places[0][0])):
            return self.cache.read([self._byte_range(*place) for place in places])
        return range_reader.read_ranges(
            [ByteRange(self.shard_url(shard), offset, size) for shard, offset, size in places]
        )

    def _byte_range(self, shard: int, offset: int, size: int) -> CachedRange:
        file = self.shards[shard]
        return CachedRange(self.shard_url(shard), file.sha256, file.bytes, offset, size)

    def _member_position(self, row: int) -> tuple[int, int, int, str]:
        """(shard, offset, size, sha256) of a row's image."""
        image = self.table["image"][row]
        return (
            self.table["shard"][row].as_py(),
            image["offset"].as_py(),
            image["size"].as_py(),
            self.table["sha256"][row].as_py(),
        )


def same_images(before: Corpus, after: Corpus) -> np.ndarray:
    """For each row of a corpus that of another with the same key and bytes, int64; -1 where there is none."""
    rows = index_in(before.table["key"], after.table["key"])
    there = np.flatnonzero(rows >= 0)
    mine, theirs = (sha256_prefixes(each.table["sha256"]) for each in (before, after))
    rows[there[(mine[there] != theirs[rows[there]]).any(axis=1)]] = -1
    return rows


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _mapped(artifact: Artifact) -> pa.Table:
    """The index as an Arrow file that all processes of a machine map, made from the parquet file once."""
    digest = next(file.sha256 for file in artifact.manifest.files if file.path == INDEX)
    path = cache_directory() / "indexes" / f"{digest}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    prune_older_than(path.parent)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the ranks of a machine one makes the file
        try:
            os.utime(path)
            return _open_mapped(path)
        except (FileNotFoundError, pa.ArrowInvalid):  # not there yet, or damaged
            _unpack(artifact.local_file(INDEX), path)
            return _open_mapped(path)


def _open_mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _unpack(parquet: Path, path: Path) -> None:
    with (
        atomic_write(path) as partial,
        pa.ipc.new_file(partial, INDEX_SCHEMA) as file,
        pq.ParquetFile(parquet) as source,
    ):
        for batch in source.iter_batches(ROWS):
            file.write_batch(batch.cast(INDEX_SCHEMA))
