"""What an earlier curation of the same kind found, for images that are still the same: so that a corpus that grows, or
loses a source, is not compared with itself anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.similarity.cells import Cells
from curation.similarity.forest import components
from curation.similarity.kmeans import Centroids
from curation.similarity.partition import Partition, Run
from curation.similarity.tiles import Found
from infra.artifacts import Artifact, open_artifact
from infra.corpora import Corpus, same_images
from infra.embeddings import Embeddings
from infra.errors import UserError

PAIRS = "pairs"


@dataclass(frozen=True)
class Earlier:
    """An earlier selection.

    Args:
        place: for each row of its corpus that of this one; -1 where the image is gone or has other bytes.
    """

    artifact: Artifact
    place: np.ndarray

    @classmethod
    def open(cls, url: str, corpus: Corpus, embeddings: Embeddings | None, steps: list[dict[str, Any]]) -> Earlier:
        """Open one that was made by the same steps over an earlier state of a corpus.

        Raises:
            UserError: it was made by other steps, or on vectors of another backbone.
        """
        artifact = open_artifact(url, "selection")
        if artifact.manifest.config.get("steps") != steps:
            raise UserError(f"previous: {url}: made by other steps; curate without it once")
        vectors = artifact.manifest.inputs.get("embeddings")
        if embeddings is not None and (vectors is None or Embeddings.open(vectors.url).backbone != embeddings.backbone):
            raise UserError(f"previous: {url}: compared vectors of another backbone; curate without it once")
        return cls(artifact, same_images(Corpus.open(artifact.manifest.inputs["corpus"].url), corpus))

    def seen(self, step: int, rows: np.ndarray) -> np.ndarray:
        """Which of some rows the step has seen before, bool `[rows]`."""
        bits = np.load(self._file(step, "seen.npy"), allow_pickle=False)
        before = self.place[np.flatnonzero(np.unpackbits(bits, count=len(self.place)))]
        return np.isin(rows, before[before >= 0])

    def cells(self, step: int) -> Cells:
        """What decided which rows the step compared."""
        with np.load(self._file(step, "cells.npz"), allow_pickle=False) as file:
            probes, margin = int(file["probes"]), float(file["margin"])
            return Cells(Centroids(file["centroids"]), file["crowded"], probes, margin)

    def runs(self, step: int, names: np.ndarray) -> list[Run]:
        """Who visited which cells.

        Args:
            names: what to call each row of this corpus, int64; -1 leaves it out.
        """
        found: list[Run] = []
        with np.load(self._file(step, "visits.npz"), allow_pickle=False) as file:
            for number in range(len(file.files) // 3):
                run = Run(*(file[f"{name}_{number}"] for name in _RUN))
                found.append(run.moved(self._named(names)))
        return found

    def forest(self, step: int, names: np.ndarray) -> tuple[Found, np.ndarray]:
        """The pairs of components that have lost no member, and the members left of those that have; named likewise."""
        table = pq.read_table(self._file(step, f"{PAIRS}.parquet"))
        rows, other, similar = (table[name].to_numpy() for name in ("row", "other", "similarity"))
        members, ends = np.unique(np.concatenate([rows, other]), return_inverse=True)
        a, b = ends[: len(rows)], ends[len(rows) :]
        labels, name = components(len(members), a, b), self._named(names)[members]
        broken = np.isin(labels, labels[name < 0])
        whole = ~broken[a]
        return (name[a[whole]], name[b[whole]], similar[whole].astype(np.float32)), name[broken & (name >= 0)]

    def hits(self, step: int, reference: str, other: Embeddings) -> pa.Table | None:
        """What the step found to be like another set, by rows of this corpus; None if it was not these vectors."""
        before = self.artifact.manifest.inputs.get(reference)
        if before is None or before.id != other.artifact.id:
            return None
        table = pq.read_table(self._file(step, f"{reference}.parquet"))
        rows = self.place[table["row"].to_numpy()]
        return table.set_column(0, "row", pa.array(rows)).filter(pa.array(rows >= 0))

    def _named(self, names: np.ndarray) -> np.ndarray:
        return np.where(self.place >= 0, names[self.place], -1)

    def _file(self, step: int, name: str) -> Path:
        return self.artifact.local_file(f"step-{step:02d}-{name}")


_RUN = ("rows", "starts", "owners")


def write_seen(path: Path, kept: np.ndarray) -> None:
    """Which rows a step sees, bool `[corpus]`."""
    np.save(path, np.packbits(kept))


def write_cells(path: Path, cells: Cells) -> None:
    """What decides which rows a step compares."""
    learned = {"centroids": cells.centroids.vectors, "crowded": cells.crowded}
    np.savez(path, probes=cells.probes, margin=cells.margin, **learned)  # type: ignore[arg-type]


def write_visits(path: Path, partition: Partition) -> None:
    """Who visits which cells, by rows of the corpus."""
    arrays: dict[str, np.ndarray] = {}
    for number, run in enumerate(partition.runs()):
        rows = partition.rows[run.rows]
        few = np.uint32 if rows.max(initial=0) < 1 << 32 else np.int64
        arrays |= {f"rows_{number}": rows.astype(few), f"starts_{number}": run.starts, f"owners_{number}": run.owners}
    np.savez(path, **arrays)  # type: ignore[arg-type]
