"""Curate: steps over a corpus to a selection, and a selection to a smaller corpus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curation.config import CurateConfig, Decontaminate, Exact, MaterializeConfig, NearDuplicates, Retrieve, Step
from curation.steps.decontaminate import decontaminate
from curation.steps.exact import exact
from curation.steps.near_duplicates import near_duplicates
from curation.steps.retrieve import retrieve
from curation.verdicts import Verdicts
from infra import selections
from infra.artifacts import Artifact, Input, Plan, produce
from infra.corpora import Corpus
from infra.embeddings import Embeddings
from infra.errors import UserError
from infra.progress import progress
from infra.selections import Selection
from infra.shards import CorpusWriter

VERSION = 1


@dataclass(frozen=True)
class Context:
    """What the steps may look at."""

    corpus: Corpus
    embeddings: Embeddings | None
    evaluation: list[Embeddings]
    seed: Embeddings | None
    selection: Selection | None

    @classmethod
    def open(cls, config: CurateConfig) -> Context:
        context = cls(
            corpus=Corpus.open(config.corpus),
            embeddings=Embeddings.open(config.embeddings) if config.embeddings else None,
            evaluation=[Embeddings.open(url) for url in config.evaluation],
            seed=Embeddings.open(config.seed) if config.seed else None,
            selection=Selection.open(config.selection) if config.selection else None,
        )
        context.check(config)
        return context

    def check(self, config: CurateConfig) -> None:
        kinds = {step.kind for step in config.steps}
        needs = {
            "embeddings": (self.embeddings, {"near_duplicates", "decontaminate", "retrieve"}),
            "evaluation": (self.evaluation, {"decontaminate"}),
            "seed": (self.seed, {"retrieve"}),
        }
        for name, (value, users) in needs.items():
            if not value and (missing := sorted(kinds & users)):
                raise UserError(f"{name}: needed by the step {missing[0]}; give the embeddings' URL")
        for other in [*self.evaluation, *([self.seed] if self.seed else [])]:
            if self.embeddings and other.backbone != self.embeddings.backbone:
                raise UserError(f"{other.artifact.url}: not of the backbone of {config.embeddings}; embed again")
        if self.embeddings:
            self.embeddings.require_keys(self.corpus.keys, self.corpus.artifact.url)
        if self.selection:
            self.selection.require_keys(self.corpus.keys, config.corpus)

    def inputs(self) -> dict[str, Input]:
        named = {"corpus": self.corpus, "embeddings": self.embeddings, "seed": self.seed, "selection": self.selection}
        named |= {f"evaluation_{i}": each for i, each in enumerate(self.evaluation)}
        return {name: each.artifact.as_input() for name, each in named.items() if each is not None}


def curate(config: CurateConfig) -> Artifact:
    """Apply the steps in order; return the selection artifact.

    Raises:
        UserError: an input is missing or belongs to another corpus.
    """
    context = Context.open(config)
    settings = config.model_dump(mode="json", include={"steps"})
    plan = Plan("selection", "curate", VERSION, settings, context.inputs())
    return produce(plan, config.out, lambda directory: _select(config, context, directory))


def _select(config: CurateConfig, context: Context, directory: Path) -> Mapping[str, Any]:
    corpus = context.corpus
    verdicts = Verdicts.after(context.selection) if context.selection else Verdicts.initial(corpus.keys)
    vectors = context.embeddings.vectors() if context.embeddings else np.empty((0, 0), dtype=np.float32)
    funnel = [{"step": "input", "kept": int(verdicts.keep.sum())}]
    with progress("curate", len(config.steps)) as advance:
        for step in config.steps:
            _apply(step, verdicts, context, vectors)
            funnel.append({"step": step.kind, "kept": int(verdicts.keep.sum())})
            if not verdicts.keep.any():
                raise UserError(f"{config.corpus}: the step {step.kind} leaves no image; loosen its threshold")
            advance(note=f"{step.kind}: {funnel[-1]['kept']} kept")
    selections.write(directory, verdicts.ledger())
    return {"images": len(corpus), "kept": int(verdicts.keep.sum()), "funnel": funnel}


def _apply(step: Step, verdicts: Verdicts, context: Context, vectors: np.ndarray) -> None:
    table = context.corpus.table
    match step:
        case Exact():
            exact(verdicts, np.array(table["sha256"].to_pylist(), dtype=object))
        case NearDuplicates():
            pixels = table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy()
            near_duplicates(verdicts, step, vectors, pixels)
        case Decontaminate():
            for evaluation in context.evaluation:
                decontaminate(verdicts, step, vectors, evaluation.vectors(), np.array(evaluation.keys, dtype=object))
        case Retrieve():
            assert context.seed is not None
            retrieve(verdicts, step, vectors, context.seed.vectors(), np.array(context.seed.keys, dtype=object))


def materialize(config: MaterializeConfig) -> Artifact:
    """Write the kept images of a selection as a corpus of their own; return it.

    Raises:
        UserError: the selection is not one over the corpus.
    """
    corpus, selection = Corpus.open(config.corpus), Selection.open(config.selection)
    selection.require_keys(corpus.keys, config.corpus)
    inputs = {"corpus": corpus.artifact.as_input(), "selection": selection.artifact.as_input()}
    plan = Plan("corpus", "materialize", VERSION, {"shard_mb": config.shard_mb}, inputs)

    def write(directory: Path) -> Mapping[str, Any]:
        writer = CorpusWriter(directory, config.shard_mb << 20)
        kept = np.flatnonzero(selection.ledger["keep"].to_numpy(zero_copy_only=False))
        with progress("materialize", len(kept)) as advance:
            for row in kept:
                writer.copy(corpus, int(row))
                advance()
        writer.finish()
        return {"images": len(kept), "classes": corpus.classes}

    return produce(plan, config.out, write)
