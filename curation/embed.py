"""Embed: a corpus to vectors, in one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curation.config import EmbedConfig
from infra.artifacts.artifact import Artifact, ArtifactSpec, get_or_create, open_artifact, open_ref
from infra.compute.ray_cluster import RayCluster
from infra.corpus import embeddings
from infra.corpus.corpus import Corpus, same_images
from infra.corpus.embeddings import Embeddings, backbone_fingerprint
from infra.errors import UserError
from infra.notices import print_loading
from infra.progress import progress
from pretrain.backbones.config import BackboneConfig
from pretrain.backbones.identity import backbone_identity

if TYPE_CHECKING:
    from pretrain.backbones.base import Backbone
    from pretrain.backbones.features import RowFeatures

VERSION = 4
_PART_ROWS = 1 << 14


@dataclass(frozen=True)
class _PreviousEmbeddings:
    """Vectors of an earlier state of the corpus."""

    embeddings: Embeddings
    place: np.ndarray
    """For each row of the corpus that of the earlier one; -1 where it was not there or had other bytes"""

    @classmethod
    def open(cls, found: Embeddings, corpus: Corpus) -> _PreviousEmbeddings:
        earlier = Corpus.from_artifact(open_ref(found.artifact.manifest.inputs["corpus"], "corpus"))
        moved = same_images(earlier, corpus)
        place = np.full(len(corpus), -1)
        place[moved[moved >= 0]] = np.flatnonzero(moved >= 0)
        return cls(found, place)


def embed(config: EmbedConfig) -> Artifact:
    """Embed every image of a corpus; return the embeddings artifact. An interrupted pass goes on after its last part.

    Raises:
        UserError: the corpus or the backbone is missing, or `previous` is of another backbone.
    """

    def write(directory: Path) -> Mapping[str, Any]:
        return _write(config, Corpus.open(config.corpus), directory)

    return get_or_create(embeddings_spec(config), config.out, write, ["part-*.npy"], config.restart)


def embeddings_spec(config: EmbedConfig) -> ArtifactSpec:
    """The embeddings that a configuration asks for.

    Raises:
        UserError: the corpus or the backbone is missing, or `previous` is of another backbone.
    """
    corpus = open_artifact(config.corpus, "corpus")
    settings, inputs = backbone_identity(config.backbone)
    if config.previous is not None:
        previous = Embeddings.open(config.previous)
        if previous.backbone != backbone_fingerprint(settings, inputs) or not previous.artifact.has_stage_version(
            VERSION
        ):
            raise UserError(f"previous: {config.previous}: of another backbone or by another Fovea; embed without it")
    return ArtifactSpec("embeddings", "embed", VERSION, settings, {"corpus": corpus.as_ref(), **inputs})


def _write(config: EmbedConfig, corpus: Corpus, directory: Path) -> Mapping[str, Any]:
    before = _PreviousEmbeddings.open(Embeddings.open(config.previous), corpus) if config.previous is not None else None
    parts = [np.arange(start, min(start + _PART_ROWS, len(corpus))) for start in range(0, len(corpus), _PART_ROWS)]
    left = [number for number in range(len(parts)) if not embeddings.part_path(directory, number).exists()]
    done = len(corpus) - sum(len(parts[number]) for number in left)
    with progress("embed", len(corpus), done) as advance:
        embedded = _embed_parts(config, corpus, before, [parts[number] for number in left], advance)
        for number, part in zip(left, embedded, strict=True):
            embeddings.write_part(directory, number, part.vectors, part.undecodable)
    embeddings.write_keys(directory, corpus.table["key"])
    undecodable = embeddings.write_undecodable(directory, len(parts))
    dim = np.load(embeddings.part_path(directory, 0), mmap_mode="r", allow_pickle=False).shape[1]
    return {"images": len(corpus), "dim": dim} | ({"undecodable": undecodable} if undecodable else {})


def _embed_parts(
    config: EmbedConfig,
    corpus: Corpus,
    before: _PreviousEmbeddings | None,
    parts: list[np.ndarray],
    advance: Callable[..., None],
) -> Iterator[RowFeatures]:
    """Vectors of each part, computed here or on a cluster."""
    if config.ray is None:
        backbone = _load(config.backbone)
        yield from (_embed_part(backbone, corpus, rows, before, config.batch, advance) for rows in parts)
        return

    def remote(rows: np.ndarray) -> RowFeatures:
        return _embed_part(_load_cached(config.backbone), corpus, rows, before, config.batch)

    for part in RayCluster(config.ray).map(remote, parts, together=1, on_gpus=True):
        advance(len(part.vectors))
        yield part


def _load(config: BackboneConfig) -> Backbone:
    print_loading("embed", "torch")
    from pretrain.backbones import registry

    return registry.load_backbone(config)


@cache
def _load_cached(config: BackboneConfig) -> Backbone:
    """Once in each process of a cluster."""
    return _load(config)


def _embed_part(
    backbone: Backbone,
    corpus: Corpus,
    rows: np.ndarray,
    before: _PreviousEmbeddings | None,
    batch: int,
    advance: Callable[..., None] = lambda count: None,
) -> RowFeatures:
    """Vectors of some rows, float16: those of images that are still the same from before, the others anew."""
    from pretrain.backbones.features import RowFeatures, extract_rows

    reused = np.zeros(len(rows), dtype=bool) if before is None else before.place[rows] >= 0
    new: list[np.ndarray] = []
    undecodable: dict[int, str] = {}
    for features in extract_rows(backbone, corpus, rows[~reused].tolist(), batch):
        new.append(embeddings.to_float16(features.vectors))
        undecodable |= features.undecodable
        advance(len(features.vectors))
    if before is None:
        return RowFeatures(np.concatenate(new), undecodable)
    vectors = np.empty((len(rows), before.embeddings.vectors.dim), dtype=np.float16)
    vectors[reused] = before.embeddings.vectors.take(before.place[rows[reused]])
    if new:
        vectors[~reused] = np.concatenate(new)
    earlier = before.embeddings.undecodable
    undecodable |= {
        int(row): earlier[place]
        for row, place in zip(rows[reused], before.place[rows[reused]].tolist(), strict=True)
        if place in earlier
    }
    advance(int(reused.sum()))
    return RowFeatures(vectors, dict(sorted(undecodable.items())))
