"""The pixel descriptor: a backbone without weights."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.backbones.config import PixelDescriptorConfig

_FLOOR = 1e-3  # below it a vector is rounding noise: an image of one color is like nothing


class PixelDescriptor:
    """Low-frequency cosine coefficients of a thumbnail, centered at mid-gray and weighted by frequency."""

    def __init__(self, config: PixelDescriptorConfig) -> None:
        from scipy.fft import dct

        self.side, self.signs = config.side, config.signs
        kept = min(config.frequencies, config.side)
        self.transform = torch.from_numpy(dct(np.eye(config.side), axis=0, norm="ortho")[:kept]).float()
        rank = torch.arange(kept, dtype=torch.float32)
        radius = (rank[:, None] ** 2 + rank[None, :] ** 2).sqrt()
        self.weights = radius**config.whiten  # 0**0 is 1: without whitening the mean color counts, with it not

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((self.side, self.side), Image.Resampling.BOX))

    def features(self, batch: Tensor) -> Tensor:
        pixels = batch.permute(0, 3, 1, 2).float() / 255 - 0.5
        coefficients = self.transform @ pixels @ self.transform.T
        vectors = (coefficients if self.signs else coefficients.abs()).mul(self.weights).flatten(1)
        return vectors * (vectors.norm(dim=1, keepdim=True) > _FLOOR)
