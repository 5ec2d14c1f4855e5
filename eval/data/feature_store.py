"""Frozen features of a backbone over a dataset, kept as an artifact: the backbone runs once, whatever reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from eval.data.views import make_view
from infra.artifacts.artifact import Artifact, ArtifactSpec, get_or_create
from infra.compute.sharded_array import l2_normalize
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from infra.hashing import hash_json
from infra.progress import progress
from infra.storage.atomic import atomic_write
from pretrain.backbones.base import Backbone, TokenBackbone
from pretrain.backbones.config import BackboneConfig
from pretrain.backbones.identity import backbone_identity
from pretrain.data.images import read_image

VERSION = 2
_LAYOUT = "layout.json"
_PART_BYTES = 1 << 28


@dataclass(frozen=True)
class FrozenFeatures:
    """Rows of features: one an image, or one a view of each image, the views of an image one after another."""

    artifact: Artifact
    views: int
    vector: int
    """Width of what `Backbone.features` gives."""
    blocks: list[int]
    """Widths of the class tokens of the last blocks, the last last; none where the backbone has no tokens"""
    mean: int
    """Width of the mean of the last block's patch tokens."""

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> FrozenFeatures:
        return cls(artifact, **artifact.read_json(_LAYOUT))

    @cached_property
    def parts(self) -> list[np.ndarray]:
        """Rows of all columns, float32, mapped from disk."""
        names = sorted(file.path for file in self.artifact.manifest.files if file.path.endswith(".npy"))
        return [np.load(self.artifact.local_file(name), mmap_mode="r", allow_pickle=False) for name in names]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def vectors(self) -> np.ndarray:
        """Vectors of the centers of all images at unit length, float32 `[n, vector]`."""
        return l2_normalize(self.raw())

    def raw(self) -> np.ndarray:
        """The same as the backbone gives them."""
        return np.concatenate([part[:, : self.vector] for part in self.parts])[:: self.views]

    def probe_columns(self, blocks: int, pooled: bool) -> np.ndarray:
        """Which columns a linear probe reads: class tokens of some last blocks and the mean of patch tokens."""
        if not self.blocks:
            return np.arange(self.vector)
        end = self.vector + sum(self.blocks)
        return np.arange(end - sum(self.blocks[-blocks:]), end + (self.mean if pooled else 0))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """All columns of some rows, float32 `[m, width]`, in their order."""
        part = np.searchsorted(self._ends, rows, side="right")
        found = np.empty((len(rows), self.parts[0].shape[1]), dtype=np.float32)
        for number in np.unique(part):
            wanted = part == number
            found[wanted] = self.parts[number][rows[wanted] - (self._ends[number] - len(self.parts[number]))]
        return found


@dataclass(frozen=True)
class Extraction:
    """How features are taken: on images `batch` at a time, loaded by `workers` processes."""

    blocks: int
    """Last blocks whose class tokens are kept."""
    views: int
    seed: int
    batch: int
    workers: int


def get_or_create_features(
    backbone: Backbone, config: BackboneConfig, corpus: Corpus, extraction: Extraction, out: str, title: str
) -> FrozenFeatures:
    """Features of a corpus: those that were kept, or new ones."""
    settings, inputs = backbone_identity(config)
    decisive = {"model": settings, "blocks": extraction.blocks, "views": extraction.views}
    if extraction.views > 1:
        decisive |= {"seed": extraction.seed}
    if corpus.rows is not None:
        decisive |= {"rows": hash_json(corpus.rows.tolist())}
    plan = ArtifactSpec("embeddings", "features", VERSION, decisive, {"corpus": corpus.artifact.as_ref(), **inputs})

    def write(directory: Path) -> Mapping[str, Any]:
        return _write(backbone, corpus, extraction, directory, title)

    return FrozenFeatures.from_artifact(get_or_create(plan, out, write, ["rows-*.npy"]))


class _ViewDataset(Dataset[torch.Tensor]):
    def __init__(self, backbone: Backbone, corpus: Corpus, extraction: Extraction, rows: range) -> None:
        self.backbone, self.corpus, self.how, self.rows = backbone, corpus, extraction, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> torch.Tensor:
        row = self.rows[place]
        image = read_image(self.corpus, row)
        return torch.stack(
            [make_view(self.backbone, image, row, number, self.how.seed) for number in range(self.how.views)]
        )


def _write(
    backbone: Backbone, corpus: Corpus, extraction: Extraction, directory: Path, title: str
) -> Mapping[str, Any]:
    """Parts that appear when they are whole; what a killed attempt left is gone on from."""
    layout = _layout(backbone, corpus, extraction)
    width = layout["vector"] + sum(layout["blocks"]) + layout["mean"]
    part_rows = max(_PART_BYTES // (4 * width * extraction.views), 1)
    starts = range(0, len(corpus), part_rows)
    left = [start for start in starts if not _part(directory, start).exists()]
    done = len(corpus) - sum(min(part_rows, len(corpus) - start) for start in left)
    with progress(title, len(corpus), done) as advance:
        for start in left:
            rows = range(start, min(start + part_rows, len(corpus)))
            found = []
            for features in _rows(backbone, corpus, extraction, rows):
                if not np.isfinite(features).all():
                    raise UserError("the backbone gives features that are not finite; are its weights whole?")
                found.append(features)
                advance(len(features) // extraction.views)
            with atomic_write(_part(directory, start), 0o644) as partial, partial.open("wb") as file:
                np.save(file, np.concatenate(found))
    (directory / _LAYOUT).write_text(json.dumps(layout | {"views": extraction.views}))
    return {"images": len(corpus), "views": extraction.views}


def _part(directory: Path, start: int) -> Path:
    return directory / f"rows-{start:012d}.npy"


def _layout(backbone: Backbone, corpus: Corpus, extraction: Extraction) -> dict[str, Any]:
    """Widths, by a look at the first image."""
    (pieces,) = _extract_batch(backbone, _ViewDataset(backbone, corpus, extraction, range(1))[0][:1], extraction)
    vector, blocks, mean = pieces
    return {"vector": vector.shape[1], "blocks": [each.shape[1] for each in blocks], "mean": mean.shape[1]}


def _rows(backbone: Backbone, corpus: Corpus, extraction: Extraction, rows: range) -> Iterator[np.ndarray]:
    """Features of some images, float32 `[images * views, width]` at a time."""
    loader = DataLoader(
        _ViewDataset(backbone, corpus, extraction, rows),
        batch_size=max(extraction.batch // extraction.views, 1),
        num_workers=extraction.workers,
    )
    for images in loader:
        for vector, blocks, mean in _extract_batch(backbone, images.flatten(0, 1), extraction):
            yield np.concatenate([vector, *blocks, mean], axis=1)


_Pieces = tuple[np.ndarray, list[np.ndarray], np.ndarray]


def _extract_batch(backbone: Backbone, batch: torch.Tensor, extraction: Extraction) -> Iterator[_Pieces]:
    """Vectors, class tokens of blocks, and means of patch tokens."""
    if not isinstance(backbone, TokenBackbone):
        plain = backbone.features(batch).numpy()
        yield plain, [], plain[:, :0]
        return
    vectors, layers = backbone.layers(batch, extraction.blocks)
    blocks = [each.class_token.cpu().numpy() for each in layers]
    yield vectors.numpy(), blocks, layers[-1].patch_tokens.mean((1, 2)).cpu().numpy()
