"""Pictures of what a backbone sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from infra.corpora import Corpus
from pretrain.backbones import CheckpointedViT, center_crop
from pretrain.data.decode import decode_rgb

_TILE = 112
_GAP = 4


def patch_pca(backbone: CheckpointedViT, corpus: Corpus, count: int, path: Path) -> None:
    """Images above the first three principal components of their patch tokens, as colours (DINOv2, figure 1).

    Images are spread over the corpus and shown to the backbone at twice its size, for a finer grid of patches; the
    components are those of all their patches together.
    """
    rows = np.linspace(0, len(corpus) - 1, min(count, len(corpus))).astype(int)
    side = 2 * backbone.model.config.image_size
    crops = np.stack([center_crop(decode_rgb(corpus.read_image(int(row))), side) for row in rows])
    tokens = backbone.tokens(torch.from_numpy(crops)).patch_tokens.float().cpu()
    grid = side // backbone.model.config.patch_size
    colours = _principal_colours(tokens.flatten(0, 1).numpy()).reshape(len(rows), grid, grid, 3)
    width, height = len(rows) * (_TILE + _GAP) - _GAP, 2 * _TILE + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    for column, (crop, colour) in enumerate(zip(crops, colours, strict=True)):
        left = column * (_TILE + _GAP)
        sheet.paste(Image.fromarray(crop).resize((_TILE, _TILE), Image.Resampling.LANCZOS), (left, 0))
        sheet.paste(Image.fromarray(colour).resize((_TILE, _TILE), Image.Resampling.NEAREST), (left, _TILE + _GAP))
    sheet.save(path)


def _principal_colours(tokens: np.ndarray) -> np.ndarray:
    """The first three principal components of `[n, dim]`, each stretched from its 2nd to its 98th percentile, uint8."""
    centred = tokens - tokens.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    directions *= np.sign(directions.sum(1, keepdims=True))  # a component's sign is arbitrary: fix it
    components = centred @ directions[:3].T
    low, high = np.percentile(components, [2, 98], axis=0)
    return (np.clip((components - low) / np.maximum(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)
