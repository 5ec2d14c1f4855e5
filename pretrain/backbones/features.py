"""Frozen features of a backbone over a corpus, in one streaming pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from infra.compute.sharded_array import l2_normalize
from infra.corpus.corpus import BadImage, Corpus
from infra.errors import UserError
from infra.progress import progress
from pretrain.backbones.base import Backbone
from pretrain.data.images import decode_image

_BLANK = 32  # side in pixels of what stands in the place of an image that cannot be decoded


class _Images(Dataset[tuple[torch.Tensor, str]]):
    def __init__(self, corpus: Corpus, backbone: Backbone, rows: Sequence[int]) -> None:
        self.corpus, self.backbone, self.rows = corpus, backbone, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[torch.Tensor, str]:
        """A preprocessed image; where it cannot be decoded, a blank one and the reason."""
        image = decode_image(self.corpus, self.corpus.read_image(self.rows[place]))
        reason = image.reason if isinstance(image, BadImage) else ""
        pixels = Image.new("RGB", (_BLANK, _BLANK)) if isinstance(image, BadImage) else image
        return torch.as_tensor(np.array(self.backbone.preprocess(pixels))), reason


@dataclass(frozen=True)
class RowFeatures:
    """Features of some rows of a corpus."""

    vectors: np.ndarray
    """float32 `[n, dim]`; 0 for images that cannot be decoded"""
    undecodable: dict[int, str]
    """Rows of such images, and why"""


def extract_rows(backbone: Backbone, corpus: Corpus, rows: Sequence[int], batch: int) -> Iterator[RowFeatures]:
    """Features of some rows, at most `batch` at a time."""
    start = 0
    for images, reasons in DataLoader(_Images(corpus, backbone, rows), batch_size=batch):
        vectors = backbone.features(images).numpy()
        bad = {place: reason for place, reason in enumerate(reasons) if reason}
        vectors[list(bad)] = 0
        yield RowFeatures(vectors, {rows[start + place]: reason for place, reason in bad.items()})
        start += len(vectors)


def extract(backbone: Backbone, corpus: Corpus, batch: int, title: str, shown: bool = True) -> np.ndarray:
    """Features of a whole corpus, float32 `[n, dim]`, each vector set to unit length.

    Raises:
        UserError: an image cannot be decoded.
    """
    found = []
    with progress(title, len(corpus), shown=shown) as advance:
        for features in extract_rows(backbone, corpus, range(len(corpus)), batch):
            for row, reason in features.undecodable.items():
                raise UserError(f"{corpus.artifact.url}: the image {corpus.key(row)} cannot be decoded ({reason})")
            found.append(features.vectors)
            advance(len(features.vectors))
    return l2_normalize(np.concatenate(found))
