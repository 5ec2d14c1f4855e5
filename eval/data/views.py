"""Views of images: the center as the backbone wants it, and random crops."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageOps

from eval.stats.rng import make_rng
from pretrain.backbones.base import Backbone, TokenBackbone

_SCALE = (0.08, 1.0)  # share of the area of a random crop, and its aspect ratio, as usual on ImageNet
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10


def make_view(backbone: Backbone, image: Image.Image, row: int, number: int, seed: int) -> torch.Tensor:
    """One view of an image, preprocessed: number 0 is its center, others are random crops, flipped or not.

    What is drawn is a function of seed, row and number.
    """
    if number == 0:
        return torch.as_tensor(np.array(backbone.preprocess(image)))
    crop = random_crop(image, make_rng(seed, "view", row, number))
    return preprocess(backbone, crop)


def preprocess(backbone: Backbone, image: Image.Image) -> torch.Tensor:
    """A whole image, squeezed to the backbone's square; nothing is cut off where that can be helped."""
    if not isinstance(backbone, TokenBackbone):
        return torch.as_tensor(np.array(backbone.preprocess(image)))
    square = image.resize((backbone.side, backbone.side), Image.Resampling.BICUBIC)
    return backbone.get_normalized_layers(torch.from_numpy(np.array(square))[None])[0]


def random_crop(image: Image.Image, chance: np.random.Generator) -> Image.Image:
    """A crop of 8 to 100 % of an image, flipped half of the time."""
    width, height = image.size
    for _ in range(_TRIES):
        area = width * height * chance.uniform(*_SCALE)
        aspect = math.exp(chance.uniform(*np.log(_ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(chance.integers(0, width - w + 1)), int(chance.integers(0, height - h + 1))
            image = image.crop((left, top, left + w, top + h))
            break
    return ImageOps.mirror(image) if chance.random() < 0.5 else image
