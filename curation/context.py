"""What the steps of a curation may look at and write to."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.config import CurateConfig
from curation.incremental import PreviousSelection
from curation.inputs import SCRATCH, Inputs
from curation.selection_state import SelectionState
from curation.similarity.tiles import CpuTiles, WorkerPool, make_workers
from infra.artifacts.artifact import find
from infra.compute.ray_cluster import RayCluster
from infra.compute.sharded_array import ShardedArray
from infra.corpus.corpus import Corpus
from infra.corpus.embeddings import Embeddings
from infra.corpus.selection import evidence_name


@dataclass(frozen=True)
class Reference:
    """Vectors that a corpus is compared with."""

    name: str
    vectors: ShardedArray
    number: int
    """Among the verdicts' references"""
    label: str
    """What its images are called: the last part of where they came from"""


def _short_name(embeddings: Embeddings, name: str) -> str:
    """What the synthetic corpus is called."""
    corpus = find(embeddings.artifact.manifest.inputs["corpus"].url)
    source = None if corpus is None else corpus.manifest.inputs.get("source")
    return name if source is None else PurePosixPath(source.url.rstrip("/")).name or name


@dataclass
class Context:
    """One curation: its inputs, its verdicts, and where a step works.

    Args:
        directory: of the artifact, where steps leave evidence.
        memory: bytes to keep to.
    """

    inputs: Inputs
    state: SelectionState
    directory: Path
    references: dict[str, Reference]
    """What the corpus is compared with, by the manifest's names"""
    memory: int
    seed: int
    workers: WorkerPool
    """What compares vectors"""
    cores: WorkerPool
    """What does everything else: a thread a core"""
    previous: PreviousSelection | None
    """What to go on from"""
    step: int = 0
    """Number of the step that works"""
    report_progress: Callable[[float], None] = lambda share: None
    """Shows how much of the step is done, of 1"""

    @classmethod
    def begin(cls, config: CurateConfig, inputs: Inputs, directory: Path) -> Context:
        keys = inputs.corpus.table["key"]
        verdicts = (
            SelectionState.from_selection(inputs.selection) if inputs.selection else SelectionState.keep_all(keys)
        )
        if inputs.embeddings is not None:
            verdicts.drop_undecodable(inputs.embeddings.undecodable)
        threads = config.workers or len(os.sched_getaffinity(0))
        memory = int(config.memory_gb * (1 << 30))
        earlier = None
        if inputs.previous is not None:
            earlier = PreviousSelection.open(inputs.previous, inputs.corpus, inputs.embeddings)
        cluster = RayCluster(config.ray) if config.ray else None
        cores = WorkerPool(CpuTiles(), threads)
        references = {
            name: Reference(name, each.vectors, verdicts.reference(each.keys), _short_name(each, name))
            for name, each in inputs.references().items()
        }
        return cls(
            inputs, verdicts, directory, references, memory, config.seed, make_workers(threads, cluster), cores, earlier
        )

    @property
    def corpus(self) -> Corpus:
        return self.inputs.corpus

    @cached_property
    def vectors(self) -> ShardedArray:
        assert self.inputs.embeddings is not None
        return self.inputs.embeddings.vectors

    @property
    def eval_embeddings(self) -> list[Reference]:
        return [each for name, each in self.references.items() if name.startswith("eval_embeddings_")]

    @property
    def seed_embeddings(self) -> Reference:
        return self.references["seed_embeddings"]

    def scratch(self) -> Path:
        """A folder for what the step needs until it ends; what an interrupted attempt left there is still there."""
        folder = self.directory / SCRATCH / f"{self.step:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def evidence(self, name: str, table: pa.Table) -> None:
        """Keep a table of the step in the artifact."""
        pq.write_table(table, self.evidence_file(f"{name}.parquet"))

    def evidence_file(self, name: str) -> Path:
        """Of the step in the artifact."""
        return self.directory / evidence_name(self.step, name)

    def shuffled(self, rows: np.ndarray, count: int, purpose: str = "") -> np.ndarray:
        """At most `count` of some rows, drawn and in an order that depend on their keys alone."""
        rows = self.state.sort_by_key(rows)
        return rows[self.generator(purpose).permutation(len(rows))[:count]]

    def generator(self, purpose: str = "") -> np.random.Generator:
        """Of the step's random numbers for a purpose, always from their beginning."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.step, *purpose.encode()])))
