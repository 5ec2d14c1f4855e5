"""What patches look like to a backbone, and where its class token looks."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from eval.data import dense_labels
from eval.report.pictures.sheet import TILE, sheet, spread, tile
from infra.corpus.corpus import Corpus
from pretrain.backbones.base import TokenBackbone, default_device
from pretrain.backbones.checkpoint_backbone import VitCheckpointBackbone
from pretrain.backbones.preprocessing import center_crop
from pretrain.data.images import read_image

_COLUMNS = 5  # images in a row, so that they can be seen
_HEADS = 6


def patch_pca(backbone: TokenBackbone, corpus: Corpus, count: int) -> bytes:
    """Images above the first principal components of their patch tokens, as colors (after DINOv2, figure 1).

    Images are spread over the corpus and shown at twice the backbone's side where it can, for a finer grid. The colors
    are the first three components of all their patches together.
    """
    crops = _crops(backbone, corpus, count)
    tokens = dense_labels.patch_tokens(backbone, crops).numpy()
    colors = principal_colors(tokens.reshape(-1, tokens.shape[-1])).reshape(*tokens.shape[:3], 3)
    lines = []
    for start in range(0, len(crops), _COLUMNS):
        some = slice(start, start + _COLUMNS)
        lines += [[tile(each) for each in crops[some]], [tile(each, smooth=False) for each in colors[some]]]
    return sheet(lines)


def _crops(backbone: TokenBackbone, corpus: Corpus, count: int) -> np.ndarray:
    side = backbone.side * (2 if backbone.any_size else 1)
    return np.stack([center_crop(read_image(corpus, int(row)), side) for row in spread(len(corpus), count)])


def principal_colors(tokens: np.ndarray) -> np.ndarray:
    """Colors of patches `[n, dim]`, uint8 `[n, 3]`: their first three principal components, from dark to bright."""
    values = _components(tokens, 3)
    low, high = np.percentile(values, [2, 98], axis=0)
    return (np.clip((values - low) / np.maximum(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)


def _components(tokens: np.ndarray, count: int) -> np.ndarray:
    """The first principal components of `[n, dim]`, `[n, count]`; of fewer dimensions the rest is 0."""
    centered = tokens.astype(np.float64) - tokens.mean(0)
    values, directions = np.linalg.eigh(centered.T @ centered)
    chosen = directions[:, np.argsort(-values)[:count]]
    chosen = chosen * np.where(chosen.sum(0) < 0, -1, 1)  # a component's sign is arbitrary: fix it
    found = np.zeros((len(tokens), count))
    found[:, : chosen.shape[1]] = centered @ chosen
    return found


def attention_maps(backbone: VitCheckpointBackbone, corpus: Corpus, count: int) -> bytes:
    """Images, and beside each where the class token looks in the last block, head by head (DINO, figure 1)."""
    crops = _crops(backbone, corpus, count)
    with torch.inference_mode():
        weights = backbone.model.get_last_self_attention(backbone.pixels(torch.from_numpy(crops).to(default_device())))
    rows = []
    for crop, heads in zip(crops, weights.float().cpu().numpy()[:, :_HEADS], strict=True):
        rows.append([tile(crop), *(tile(_heat(head), smooth=False) for head in heads)])
    return sheet(rows)


def _heat(values: np.ndarray) -> Image.Image:
    """Weights `[h, w]` as colors from dark to bright."""
    from matplotlib import colormaps

    scaled = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    colors = (colormaps["inferno"](scaled)[..., :3] * 255).astype(np.uint8)
    return Image.fromarray(colors).resize((TILE, TILE), Image.Resampling.NEAREST)
