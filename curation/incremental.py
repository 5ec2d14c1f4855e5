"""What an earlier curation of the same kind found, for images that are still the same: so that a corpus that grows, or
loses a source, is not compared with itself anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.similarity.cells import Cells
from curation.similarity.forest import components
from curation.similarity.kmeans import Centroids
from curation.similarity.partition import InvertedLists, Partition
from curation.similarity.tiles import Found
from infra.artifacts.artifact import Artifact, open_ref
from infra.artifacts.manifest import ArtifactRef
from infra.compute.sharded_array import ShardedArray
from infra.corpus.corpus import Corpus, same_images
from infra.corpus.embeddings import Embeddings
from infra.corpus.selection import evidence_name

PAIRS, SEEN = "pairs", "seen.npy"
_BLOCK = 1 << 14


def _embeddings(given: ArtifactRef) -> Embeddings:
    return Embeddings.from_artifact(open_ref(given, "embeddings"))


@dataclass(frozen=True)
class PreviousSelection:
    """An earlier selection.

    Args:
        place: for each row of its corpus that of this one; -1 where the image is gone, or its bytes or vector changed.
    """

    artifact: Artifact
    place: np.ndarray

    @classmethod
    def open(cls, artifact: Artifact, corpus: Corpus, embeddings: Embeddings | None) -> PreviousSelection:
        """Open what a selection over an earlier state of a corpus left.

        Raises:
            UserError: that corpus or its embeddings are no longer where they were.
        """
        inputs = artifact.manifest.inputs
        place = same_images(Corpus.from_artifact(open_ref(inputs["corpus"], "corpus")), corpus)
        if embeddings is not None:
            _drop_changed_keys(place, _embeddings(inputs["embeddings"]).vectors, embeddings.vectors)
        return cls(artifact, place)

    def read_seen(self, step: int, rows: np.ndarray) -> np.ndarray:
        """Which of some rows the step has seen before, bool `[rows]`."""
        bits = np.load(self._file(step, SEEN), allow_pickle=False)
        before = self.place[np.flatnonzero(np.unpackbits(bits, count=len(self.place)))]
        return np.isin(rows, before[before >= 0])

    def read_cells(self, step: int) -> Cells:
        """What decided which rows the step compared."""
        with np.load(self._file(step, "cells.npz"), allow_pickle=False) as file:
            probes, margin = int(file["probes"]), float(file["margin"])
            return Cells(Centroids(file["centroids"]), file["dense"], probes, margin)

    def read_assignments(self, step: int, names: np.ndarray) -> InvertedLists:
        """Who visited which cells.

        Args:
            names: what to call each row of this corpus, int64; -1 leaves it out.
        """
        with np.load(self._file(step, "visits.npz"), allow_pickle=False) as file:
            return InvertedLists(file["rows"], file["starts"], file["primary"]).shifted(self._named(names))

    def read_forest(self, step: int, names: np.ndarray) -> tuple[Found, np.ndarray]:
        """The pairs of components that have lost no member, and the members left of those that have; named likewise."""
        table = pq.read_table(self._file(step, f"{PAIRS}.parquet"))
        rows, other, similar = (table[name].to_numpy() for name in ("row", "other", "similarity"))
        members, ends = np.unique(np.concatenate([rows, other]), return_inverse=True)
        a, b = ends[: len(rows)], ends[len(rows) :]
        labels, name = components(len(members), a, b), self._named(names)[members]
        broken = np.isin(labels, labels[name < 0])
        whole = ~broken[a]
        return (name[a[whole]], name[b[whole]], similar[whole].astype(np.float32)), name[broken & (name >= 0)]

    def read_hits(
        self, step: int, reference: str, other: Embeddings, rows: np.ndarray
    ) -> tuple[pa.Table | None, np.ndarray]:
        """What the step found among some rows to be like another set, and which of them it had compared with it."""
        before = self.artifact.manifest.inputs.get(reference)
        if before is None or before.id != other.artifact.id:
            return None, np.zeros(len(rows), dtype=bool)
        known, table = self.read_seen(step, rows), pq.read_table(self._file(step, f"{reference}.parquet"))
        table = table.set_column(0, "row", pa.array(self.place[table["row"].to_numpy()]))
        return table.filter(pa.array(np.isin(table["row"].to_numpy(), rows[known]))), known

    def _named(self, names: np.ndarray) -> np.ndarray:
        return np.where(self.place >= 0, names[self.place], -1)

    def _file(self, step: int, name: str) -> Path:
        return self.artifact.local_file(evidence_name(step, name))


def _drop_changed_keys(place: np.ndarray, before: ShardedArray, after: ShardedArray) -> None:
    """Take rows whose vectors are not the same to the bit for gone: another machine may round otherwise."""
    for start in range(0, len(place), _BLOCK):
        there = start + np.flatnonzero(place[start : start + _BLOCK] >= 0)
        mine, theirs = before.take(there), after.take(place[there])
        place[there[(mine.view(np.uint16) != theirs.view(np.uint16)).any(axis=1)]] = -1


def write_seen(path: Path, kept: np.ndarray) -> None:
    """Which rows a step sees, bool `[corpus]`."""
    np.save(path, np.packbits(kept))


def write_cells(path: Path, cells: Cells) -> None:
    """What decides which rows a step compares."""
    learned = {"centroids": cells.centroids.vectors, "dense": cells.dense}
    np.savez(path, probes=cells.probes, margin=cells.margin, **learned)  # type: ignore[arg-type]


def write_assignments(path: Path, partition: Partition) -> None:
    """Who visits which cells, by rows of the corpus."""
    run = partition.inverted_lists()
    few = np.uint32 if partition.rows.max(initial=0) < 1 << 32 else np.int64
    arrays = {"rows": partition.rows[run.rows].astype(few), "starts": run.starts, "primary": run.primary}
    np.savez(path, **arrays)
