"""Views of one image: crops cut on the CPU, with the parameters of the recolouring the device will do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from pretrain.data.config import Crops
from pretrain.data.photometric import draw

_ASPECTS = (3 / 4, 4 / 3)


GLOBAL_COUNT = 2


def resized_crop_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom) whose area is a share `scale` of the image, as RandomResizedCrop's."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * _ASPECTS[1])), min(height, round(width / _ASPECTS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def cut(
    image: Image.Image, crops: Crops, count: int, flip: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut `count` random crops.

    Returns:
        pixels uint8 `[count, size, size, 3]` and photometric parameters float32 `[count, 9]`.
    """
    pixels = np.empty((count, crops.size, crops.size, 3), dtype=np.uint8)
    parameters = []
    for i in range(count):
        box = resized_crop_box(image.width, image.height, crops.scale, rng)
        side = (crops.size, crops.size)
        crop: Any = np.asarray(image.resize(side, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
        pixels[i] = crop[:, ::-1] if rng.random() < flip else crop
        parameters.append(draw(crops.photometric[min(i, len(crops.photometric) - 1)], rng))
    return pixels, np.stack(parameters) if parameters else np.empty((0, 9), dtype=np.float32)
