"""Frozen features of a backbone over a corpus, in one streaming pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from infra.corpora import Corpus
from infra.progress import progress
from infra.vectors import at_unit_length
from pretrain.backbones import Backbone
from pretrain.data.decode import decode_rgb


class _Images(Dataset[torch.Tensor]):
    def __init__(self, corpus: Corpus, backbone: Backbone, rows: Sequence[int]) -> None:
        self.corpus, self.backbone, self.rows = corpus, backbone, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> torch.Tensor:
        image = decode_rgb(self.corpus.read_image(self.rows[place]))
        return torch.as_tensor(np.array(self.backbone.preprocess(image)))


def images_of(
    backbone: Backbone, corpus: Corpus, rows: Sequence[int], batch: int, workers: int = 0
) -> Iterator[torch.Tensor]:
    """Preprocessed images of some rows, a stack at a time; loaded in `workers` processes, or here."""
    yield from DataLoader(_Images(corpus, backbone, rows), batch_size=batch, num_workers=workers)


def of_rows(backbone: Backbone, corpus: Corpus, rows: Sequence[int], batch: int) -> Iterator[np.ndarray]:
    """Features of some rows, float32 `[<= batch, dim]` at a time."""
    for images in images_of(backbone, corpus, rows, batch):
        yield backbone.features(images).numpy()


def extract(backbone: Backbone, corpus: Corpus, batch: int, title: str, shown: bool = True) -> np.ndarray:
    """Features of a whole corpus, float32 `[n, dim]`, each vector set to unit length."""
    found = []
    with progress(title, len(corpus), shown=shown) as advance:
        for features in of_rows(backbone, corpus, range(len(corpus)), batch):
            found.append(features)
            advance(len(features))
    features = np.concatenate(found)
    return at_unit_length(features)
