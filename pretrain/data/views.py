"""Views of one image: crops cut on the CPU, with the parameters of the recolouring the device will do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pretrain.data.config import Crops, Views
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


def harmless_shrink(width: int, height: int, views: Views) -> int:
    """The largest whole factor by which an image may shrink while its smallest crop keeps as many pixels as asked."""
    crops = [(views.globals, max(views.globals.size, views.plain_size or 0))]
    if views.local_count:
        crops.append((views.locals, views.locals.size))
    sides = (math.sqrt(width * height * kind.scale[0]) / size for kind, size in crops)
    return max(1, int(min(sides)))


@dataclass(frozen=True)
class Cut:
    """Crops of one image."""

    pixels: np.ndarray
    """uint8 `[count, size, size, 3]`"""
    photometric: np.ndarray
    """float32 `[count, 9]`"""
    plain: np.ndarray
    """uint8 `[count, plain size, plain size, 3]`: the same boxes; no crops where no plain size is asked for"""


def cut(
    image: Image.Image, crops: Crops, count: int, views: Views, rng: np.random.Generator, plain_size: int | None = None
) -> Cut:
    """Cut `count` random crops."""
    pixels = np.empty((count, crops.size, crops.size, 3), dtype=np.uint8)
    plain = np.empty((count if plain_size else 0, plain_size or 0, plain_size or 0, 3), dtype=np.uint8)
    parameters = np.empty((count, 9), dtype=np.float32)
    for i in range(count):
        box = resized_crop_box(image.width, image.height, crops.scale, rng)
        turned = rng.random() < views.flip
        pixels[i] = _resized(image, box, crops.size, turned)
        if plain_size:
            plain[i] = _resized(image, box, plain_size, turned)
        parameters[i] = draw(crops.photometric[min(i, len(crops.photometric) - 1)], rng, views.inverted_blur)
    return Cut(pixels, parameters, plain)


def _resized(image: Image.Image, box: tuple[int, int, int, int], size: int, turned: bool) -> np.ndarray:
    crop: Any = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
    return crop[:, ::-1] if turned else crop
