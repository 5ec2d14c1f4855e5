"""Embeddings: float16 parts of unit vectors with the keys they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra.artifacts.artifact import Artifact, open_artifact
from infra.artifacts.manifest import ArtifactRef
from infra.compute.sharded_array import ShardedArray, l2_normalize
from infra.errors import UserError
from infra.hashing import hash_json
from infra.storage.atomic import atomic_write

KEYS = "keys.parquet"
UNDECODABLE = "undecodable.json"
_NONE: Mapping[int, str] = {}


def backbone_fingerprint(settings: Mapping[str, Any], inputs: Mapping[str, ArtifactRef]) -> str:
    """What makes vectors, by the settings and inputs of their artifact."""
    return hash_json([settings, {name: each.id for name, each in inputs.items() if name != "corpus"}])


@dataclass
class Embeddings:
    """Vectors of an embeddings artifact, row-aligned with `keys`."""

    artifact: Artifact
    keys: pa.ChunkedArray

    @classmethod
    def open(cls, url: str) -> Embeddings:
        return cls.from_artifact(open_artifact(url, "embeddings"))

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Embeddings:
        return cls(artifact, pq.read_table(artifact.local_file(KEYS))["key"])

    @property
    def backbone(self) -> str:
        """What made the vectors: only vectors of one backbone can be compared."""
        return backbone_fingerprint(self.artifact.manifest.config, self.artifact.manifest.inputs)

    @cached_property
    def vectors(self) -> ShardedArray:
        """The rows, read in pieces."""
        names = sorted(file.path for file in self.artifact.manifest.files if file.path.endswith(".npy"))
        return ShardedArray([self.artifact.local_file(name) for name in names])

    @cached_property
    def undecodable(self) -> dict[int, str]:
        """Rows of images that could not be decoded, whose vectors are 0, and why."""
        there = any(file.path == UNDECODABLE for file in self.artifact.manifest.files)
        content = self.artifact.read_json(UNDECODABLE) if there else {}
        return {int(row): reason for row, reason in content.items()}

    def require_keys(self, keys: pa.ChunkedArray, owner: str) -> None:
        """Check that the rows are those of a corpus.

        Raises:
            UserError: they are not.
        """
        if not self.keys.equals(keys):
            raise UserError(f"{self.artifact.url}: embeds other images than {owner}; embed that corpus again")


def write_keys(directory: Path, keys: pa.ChunkedArray) -> None:
    """Say whose vectors the parts hold, in their order."""
    pq.write_table(pa.table({"key": keys}), directory / KEYS)


def part_path(directory: Path, number: int) -> Path:
    return directory / f"part-{number:05d}.npy"


def to_float16(vectors: np.ndarray) -> np.ndarray:
    """Vectors `[n, dim]`, set to unit length, as they are kept: float16.

    Raises:
        UserError: they are not all finite.
    """
    if not np.isfinite(vectors).all():
        raise UserError("the backbone gives vectors that are not finite; are its weights whole?")
    return l2_normalize(vectors).astype(np.float16)


def write_undecodable(directory: Path, parts: int) -> int:
    """Collect what `write_part` noted of images that could not be decoded; return their number."""
    rows: dict[str, str] = {}
    for number in range(parts):
        note = _note_path(directory, number)
        rows |= json.loads(note.read_text()) if note.exists() else {}
    if rows:
        (directory / UNDECODABLE).write_text(json.dumps(rows))
    return len(rows)


def _note_path(directory: Path, number: int) -> Path:
    return directory / f".undecodable-{number:05d}.json"


def write_part(directory: Path, number: int, vectors: np.ndarray, undecodable: Mapping[int, str] = _NONE) -> None:
    """Write vectors of unit length, float16 `[n, dim]`, as one part; it is there when it is whole.

    Args:
        undecodable: rows of the corpus in this part whose images could not be decoded, and why.
    """
    if undecodable:
        with atomic_write(_note_path(directory, number)) as note:
            note.write_text(json.dumps({str(row): reason for row, reason in undecodable.items()}))
    with atomic_write(part_path(directory, number), 0o644) as partial, partial.open("wb") as file:
        np.save(file, vectors)
