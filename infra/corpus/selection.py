"""Selections: a verdict for every image of a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from infra.artifacts.artifact import Artifact, open_artifact
from infra.errors import UserError

LEDGER = "selection.parquet"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("keep", pa.bool_()),
        ("step", pa.string()),  # the step that dropped it, or that said last why it is kept
        ("reason", pa.string()),
        ("matched_key", pa.string()),  # what it was compared with: a representative, an evaluation image, a seed image
        ("score", pa.float32()),  # the similarity to it
        (
            "duplicate_group",
            pa.int64(),
        ),  # group of copies: the place of its representative's key among all keys in order
        ("weight", pa.float32()),  # how many images it stands for
    ]
)


@dataclass(frozen=True)
class Selection:
    """A selection artifact, opened: one row for each sample of the corpus, in its order."""

    artifact: Artifact
    ledger: pa.Table

    @classmethod
    def open(cls, url: str) -> Selection:
        artifact = open_artifact(url, "selection")
        return cls(artifact, pq.read_table(artifact.local_file(LEDGER), schema=SCHEMA))

    def require_keys(self, keys: pa.ChunkedArray, owner: str) -> None:
        """Check that the rows are those of a corpus.

        Raises:
            UserError: they are not.
        """
        if not self.ledger["key"].equals(keys):
            raise UserError(f"{self.artifact.url}: judges another corpus than {owner}; give one over it")


@dataclass(frozen=True)
class Step:
    """How many images a step of a funnel left."""

    name: str
    kept: int
    dropped: int


def read_steps(selection: Artifact) -> list[Step]:
    """The steps of a selection, in words."""
    return [
        Step(after["step"].replace("_", " "), after["kept"], before["kept"] - after["kept"])
        for before, after in pairwise(selection.metrics["funnel"])
    ]


def evidence_name(step: int, name: str) -> str:
    """The file in which a step of a selection leaves what it compared."""
    return f"step-{step:02d}-{name}"


def write(directory: Path, ledger: pa.Table) -> None:
    pq.write_table(ledger.cast(SCHEMA), directory / LEDGER)
