"""Embed: a corpus to vectors, in one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curation.config import EmbedConfig
from infra import embeddings
from infra.artifacts import Artifact, Plan, produce
from infra.corpora import Corpus, same_images
from infra.embeddings import Embeddings, backbone_of
from infra.errors import UserError
from infra.progress import progress
from pretrain import backbones
from pretrain.backbones import Backbone
from pretrain.features import of_rows

VERSION = 3
_PART_ROWS = 1 << 14


@dataclass(frozen=True)
class _Before:
    """Vectors of an earlier state of the corpus."""

    embeddings: Embeddings
    place: np.ndarray
    """For each row of the corpus that of the earlier one; -1 where it was not there or had other bytes"""

    @classmethod
    def open(cls, url: str, corpus: Corpus, backbone: tuple[str, str | None]) -> _Before:
        found = Embeddings.open(url)
        if found.backbone != backbone:
            raise UserError(f"previous: {url}: of another backbone; embed without it")
        moved = same_images(Corpus.open(found.artifact.manifest.inputs["corpus"].url), corpus)
        place = np.full(len(corpus), -1)
        place[moved[moved >= 0]] = np.flatnonzero(moved >= 0)
        return cls(found, place)


def embed(config: EmbedConfig) -> Artifact:
    """Embed every image of a corpus; return the embeddings artifact. An interrupted pass goes on after its last part.

    Raises:
        UserError: the corpus or the backbone is missing, or `previous` is of another backbone.
    """
    corpus = Corpus.open(config.corpus)
    settings, inputs = backbones.identity(config.backbone)
    before = _Before.open(config.previous, corpus, backbone_of(settings, inputs)) if config.previous else None
    plan = Plan("embeddings", "embed", VERSION, settings, {"corpus": corpus.artifact.as_input(), **inputs})
    return produce(plan, config.out, lambda directory: _write(config, corpus, before, directory), keep_work=True)


def _write(config: EmbedConfig, corpus: Corpus, before: _Before | None, directory: Path) -> Mapping[str, Any]:
    parts = [np.arange(start, min(start + _PART_ROWS, len(corpus))) for start in range(0, len(corpus), _PART_ROWS)]
    left = [number for number in range(len(parts)) if not embeddings.part_path(directory, number).exists()]
    done = len(corpus) - sum(len(parts[number]) for number in left)
    backbone = backbones.load(config.backbone)
    with progress("embed", len(corpus), done) as advance:
        for number in left:
            vectors = _part(backbone, corpus, parts[number], before, config.batch, advance)
            embeddings.write_part(directory, number, vectors)
    embeddings.write_keys(directory, corpus.table["key"])
    dim = np.load(embeddings.part_path(directory, 0), mmap_mode="r", allow_pickle=False).shape[1]
    return {"images": len(corpus), "dim": dim}


def _part(
    backbone: Backbone,
    corpus: Corpus,
    rows: np.ndarray,
    before: _Before | None,
    batch: int,
    advance: Callable[..., None],
) -> np.ndarray:
    """Vectors of some rows, float16: those of images that are still the same from before, the others anew."""
    known = np.zeros(len(rows), dtype=bool) if before is None else before.place[rows] >= 0
    found = []
    for features in of_rows(backbone, corpus, rows[~known].tolist(), batch):
        found.append(embeddings.stored(features))
        advance(len(features))
    if before is None:
        return np.concatenate(found)
    vectors = np.empty((len(rows), before.embeddings.vectors.dim), dtype=np.float16)
    vectors[known] = before.embeddings.vectors.take(before.place[rows[known]])
    if found:
        vectors[~known] = np.concatenate(found)
    advance(int(known.sum()))
    return vectors
