"""Frozen features of a backbone over a corpus, in one streaming pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from infra.corpora import Corpus
from infra.progress import progress
from pretrain.backbones import Backbone
from pretrain.data.decode import decode_rgb


class _Images(Dataset[torch.Tensor]):
    def __init__(self, corpus: Corpus, backbone: Backbone) -> None:
        self.corpus, self.backbone = corpus, backbone

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.as_tensor(np.array(self.backbone.preprocess(decode_rgb(self.corpus.read_image(row)))))


def stream(backbone: Backbone, corpus: Corpus, batch: int, title: str, shown: bool = True) -> Iterator[np.ndarray]:
    """Features of consecutive rows, float32 `[<= batch, dim]` at a time; memory does not grow with the corpus."""
    loader = DataLoader(_Images(corpus, backbone), batch_size=batch)
    with progress(title, len(corpus), shown=shown) as advance:
        for images in loader:
            yield backbone.features(images).numpy()
            advance(len(images))


def extract(backbone: Backbone, corpus: Corpus, batch: int, title: str, shown: bool = True) -> np.ndarray:
    """Features of a whole corpus, float32 `[n, dim]`, each vector set to unit length."""
    features = np.concatenate(list(stream(backbone, corpus, batch, title, shown)))
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
