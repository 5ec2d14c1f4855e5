"""The artifacts that a curation reads, opened and checked against one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from curation.config import CurateConfig
from curation.steps.config import CaptionScorer, HeadScorer, Score, Step
from infra.artifacts.artifact import Artifact, open_artifact, open_ref
from infra.artifacts.manifest import ArtifactRef
from infra.corpus.corpus import Corpus
from infra.corpus.embeddings import Embeddings
from infra.corpus.selection import Selection
from infra.errors import UserError

SCRATCH = ".scratch"
"""Folder of what a step needs until it ends."""
STATE = ".verdicts.npz"
"""The verdicts after the last finished step, while others are to come."""
_NEEDS = {
    "embeddings": ("near_duplicates", "decontaminate", "semdedup", "retrieve", "retrieve_clusters", "balance"),
    "eval_embeddings": ("decontaminate",),
    "seed_embeddings": ("retrieve", "retrieve_clusters"),
}


def _needed_to_score(step: Step) -> str | None:
    on_vectors = isinstance(step, Score) and isinstance(step.scorer, HeadScorer | CaptionScorer)
    return "embeddings" if on_vectors else None


@dataclass(frozen=True)
class Inputs:
    """The artifacts of a curation."""

    corpus: Corpus
    embeddings: Embeddings | None
    eval_embeddings: list[Embeddings]
    seed_embeddings: Embeddings | None
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
            eval_embeddings=[Embeddings.open(url) for url in config.eval_embeddings],
            seed_embeddings=Embeddings.open(config.seed_embeddings) if config.seed_embeddings else None,
            selection=Selection.open(config.selection) if config.selection else None,
        )
        inputs._check(config)
        return inputs

    def _check(self, config: CurateConfig) -> None:
        for name, users in _NEEDS.items():
            needing = [step.kind for step in config.steps if step.kind in users or name == _needed_to_score(step)]
            if needing and not getattr(self, name):
                raise UserError(f"{name}: needed by the step {needing[0]}; give the embeddings' URL")
        for other in [*self.eval_embeddings, *([self.seed_embeddings] if self.seed_embeddings else [])]:
            if self.embeddings and other.backbone != self.embeddings.backbone:
                raise UserError(f"{other.artifact.url}: not of the backbone of {config.embeddings}; embed again")
        keys = self.corpus.table["key"]
        if self.embeddings:
            self.embeddings.require_keys(keys, config.corpus)
        if self.selection:
            self.selection.require_keys(keys, config.corpus)

    def by_name(self) -> dict[str, ArtifactRef]:
        """As the manifest names them."""
        named: dict[str, Corpus | Embeddings | Selection | None]
        named = {"corpus": self.corpus, "embeddings": self.embeddings, "selection": self.selection, **self.references()}
        found = {name: each.artifact.as_ref() for name, each in named.items() if each is not None}
        return found if self.previous is None else found | {"previous": self.previous.as_ref()}

    def references(self) -> dict[str, Embeddings]:
        """What the corpus is compared with, always in the same order: saved verdicts know it by its number."""
        found = {f"eval_embeddings_{i}": each for i, each in enumerate(self.eval_embeddings)}
        return found if self.seed_embeddings is None else found | {"seed_embeddings": self.seed_embeddings}


def require_same_backbone(
    artifact: Artifact, version: int, steps: list[dict[str, Any]], embeddings: Embeddings | None
) -> None:
    """Check that an earlier selection was made as one that is to go on from it.

    Raises:
        UserError: by other steps, another version, or on vectors of another backbone.
    """
    again = "curate without it once"
    if artifact.manifest.config.get("steps") != steps:
        raise UserError(f"previous: {artifact.url}: made by other steps; {again}")
    if not artifact.has_stage_version(version):
        raise UserError(f"previous: {artifact.url}: made by another version of Fovea; {again}")
    before = artifact.manifest.inputs.get("embeddings")
    if embeddings is None:
        return
    if before is None or Embeddings.from_artifact(open_ref(before, "embeddings")).backbone != embeddings.backbone:
        raise UserError(f"previous: {artifact.url}: compared vectors of another backbone; {again}")
