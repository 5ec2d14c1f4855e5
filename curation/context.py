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
from curation.earlier import Earlier
from curation.similarity.tiles import CpuTiles, Workers, workers
from curation.steps.config import CaptionScorer, HeadScorer, Score, Step
from curation.verdicts import Verdicts
from infra.artifacts import Artifact, Input, find, open_artifact
from infra.cluster import Cluster
from infra.corpora import Corpus
from infra.embeddings import Embeddings
from infra.errors import UserError
from infra.selections import Selection, evidence_name
from infra.vectors import Vectors

SCRATCH = ".scratch"
_NEEDS = {
    "embeddings": ("near_duplicates", "decontaminate", "semdedup", "retrieve", "retrieve_clusters", "balance"),
    "evaluation": ("decontaminate",),
    "curated": ("retrieve", "retrieve_clusters"),
}


def _needed_to_score(step: Step) -> str | None:
    on_vectors = isinstance(step, Score) and isinstance(step.scorer, HeadScorer | CaptionScorer)
    return "embeddings" if on_vectors else None


@dataclass(frozen=True)
class Reference:
    """Vectors that a corpus is compared with."""

    name: str
    vectors: Vectors
    number: int
    """Among the verdicts' references"""
    label: str
    """What its images are called: the last part of where they came from"""


@dataclass(frozen=True)
class Inputs:
    """The artifacts of a curation."""

    corpus: Corpus
    embeddings: Embeddings | None
    evaluation: list[Embeddings]
    curated: Embeddings | None
    selection: Selection | None
    previous: Artifact | None

    @classmethod
    def open(cls, config: CurateConfig) -> Inputs:
        """Open what a configuration names.

        Raises:
            UserError: something is missing, or belongs to another corpus or backbone.
        """
        inputs = cls(
            corpus=Corpus.open(config.corpus),
            embeddings=Embeddings.open(config.embeddings) if config.embeddings else None,
            previous=open_artifact(config.previous, "selection") if config.previous else None,
            evaluation=[Embeddings.open(url) for url in config.evaluation],
            curated=Embeddings.open(config.curated) if config.curated else None,
            selection=Selection.open(config.selection) if config.selection else None,
        )
        inputs._check(config)
        return inputs

    def _check(self, config: CurateConfig) -> None:
        for name, users in _NEEDS.items():
            needing = [step.kind for step in config.steps if step.kind in users or name == _needed_to_score(step)]
            if needing and not getattr(self, name):
                raise UserError(f"{name}: needed by the step {needing[0]}; give the embeddings' URL")
        for other in [*self.evaluation, *([self.curated] if self.curated else [])]:
            if self.embeddings and other.backbone != self.embeddings.backbone:
                raise UserError(f"{other.artifact.url}: not of the backbone of {config.embeddings}; embed again")
        keys = self.corpus.table["key"]
        if self.embeddings:
            self.embeddings.require_keys(keys, config.corpus)
        if self.selection:
            self.selection.require_keys(keys, config.corpus)

    def by_name(self) -> dict[str, Input]:
        """As the manifest names them."""
        named: dict[str, Corpus | Embeddings | Selection | None]
        named = {"corpus": self.corpus, "embeddings": self.embeddings, "selection": self.selection, **self.references()}
        found = {name: each.artifact.as_input() for name, each in named.items() if each is not None}
        return found if self.previous is None else found | {"previous": self.previous.as_input()}

    def references(self) -> dict[str, Embeddings]:
        """What the corpus is compared with, always in the same order: saved verdicts know it by its number."""
        found = {f"evaluation_{i}": each for i, each in enumerate(self.evaluation)}
        return found if self.curated is None else found | {"curated": self.curated}


def _label(embeddings: Embeddings, name: str) -> str:
    """What the embedded corpus is called."""
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
    verdicts: Verdicts
    directory: Path
    references: dict[str, Reference]
    """What the corpus is compared with, by the manifest's names"""
    memory: int
    seed: int
    workers: Workers
    """What compares vectors"""
    cores: Workers
    """What does everything else: a thread a core"""
    earlier: Earlier | None
    """What to go on from"""
    step: int = 0
    """Number of the step that works"""
    reach: Callable[[float], None] = lambda share: None
    """Shows how much of the step is done, of 1"""

    @classmethod
    def begin(cls, config: CurateConfig, inputs: Inputs, directory: Path) -> Context:
        keys = inputs.corpus.table["key"]
        verdicts = Verdicts.after(inputs.selection) if inputs.selection else Verdicts.initial(keys)
        if inputs.embeddings is not None:
            verdicts.drop_undecodable(inputs.embeddings.undecodable)
        threads = config.workers or len(os.sched_getaffinity(0))
        memory = int(config.memory_gb * (1 << 30))
        earlier = None
        if inputs.previous is not None:
            earlier = Earlier.open(inputs.previous, inputs.corpus, inputs.embeddings)
        cluster = Cluster(config.ray) if config.ray else None
        cores = Workers(CpuTiles(), threads)
        references = {
            name: Reference(name, each.vectors, verdicts.reference(each.keys), _label(each, name))
            for name, each in inputs.references().items()
        }
        return cls(
            inputs, verdicts, directory, references, memory, config.seed, workers(threads, cluster), cores, earlier
        )

    @property
    def corpus(self) -> Corpus:
        return self.inputs.corpus

    @cached_property
    def vectors(self) -> Vectors:
        assert self.inputs.embeddings is not None
        return self.inputs.embeddings.vectors

    @property
    def evaluation(self) -> list[Reference]:
        return [each for name, each in self.references.items() if name.startswith("evaluation_")]

    @property
    def curated(self) -> Reference:
        return self.references["curated"]

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
        rows = self.verdicts.in_order(rows)
        return rows[self.generator(purpose).permutation(len(rows))[:count]]

    def generator(self, purpose: str = "") -> np.random.Generator:
        """Of the step's random numbers for a purpose, always from their beginning."""
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.step, *purpose.encode()])))
