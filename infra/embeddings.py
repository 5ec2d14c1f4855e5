"""Embeddings: float16 parts of unit vectors with the keys they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.artifacts import Artifact, open_artifact
from infra.errors import UserError
from infra.hashing import hash_json
from infra.vectors import Vectors

KEYS = "keys.parquet"


@dataclass
class Embeddings:
    """Vectors of an embeddings artifact, row-aligned with `keys`."""

    artifact: Artifact
    keys: pa.ChunkedArray

    @classmethod
    def open(cls, url: str) -> Embeddings:
        artifact = open_artifact(url, "embeddings")
        return cls(artifact, pq.read_table(artifact.local_file(KEYS))["key"])

    @property
    def backbone(self) -> tuple[str, str | None]:
        """What made the vectors: only vectors of one backbone can be compared."""
        weights = self.artifact.manifest.inputs.get("backbone")
        return hash_json(self.artifact.manifest.config), weights.id if weights else None

    @cached_property
    def vectors(self) -> Vectors:
        """The rows, read in pieces."""
        names = sorted(file.path for file in self.artifact.manifest.files if file.path.endswith(".npy"))
        return Vectors([self.artifact.local_file(name) for name in names])

    def require_keys(self, keys: pa.ChunkedArray, owner: str) -> None:
        """Check that the rows are those of a corpus.

        Raises:
            UserError: they are not.
        """
        if not self.keys.equals(keys):
            raise UserError(f"{self.artifact.url}: embeds other images than {owner}; embed that corpus again")


def write(directory: Path, keys: pa.ChunkedArray, parts: Iterable[np.ndarray]) -> int:
    """Write unit vectors part by part; return their dimension."""
    dim = 0
    for number, part in enumerate(parts):
        norms = np.linalg.norm(part, axis=1, keepdims=True)
        np.save(directory / f"part-{number:05d}.npy", (part / np.maximum(norms, 1e-12)).astype(np.float16))
        dim = part.shape[1]
    pq.write_table(pa.table({"key": keys}), directory / KEYS)
    return dim


def regroup(batches: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Join small pieces into parts of at least `rows` rows; the last may be shorter."""
    waiting: list[np.ndarray] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= rows:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)
