"""Views of one image: crops cut on the CPU, recoloured there or with the parameters for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

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
    """float32 `[count, 9]`: how the training device has to recolour them; no rows where that is done"""
    plain: np.ndarray
    """uint8 `[count, plain size, plain size, 3]`: the same boxes, never recoloured; none where no size is asked for"""


def cut(
    image: np.ndarray, crops: Crops, count: int, views: Views, rng: np.random.Generator, plain_size: int | None = None
) -> Cut:
    """Cut `count` random crops of an image, uint8 `[h, w, 3]`."""
    in_place = views.recolour_on == "workers"
    pixels = np.empty((count, crops.size, crops.size, 3), dtype=np.uint8)
    plain = np.empty((count if plain_size else 0, plain_size or 0, plain_size or 0, 3), dtype=np.uint8)
    later = np.empty((0 if in_place else count, 9), dtype=np.float32)
    for i in range(count):
        box = resized_crop_box(image.shape[1], image.shape[0], crops.scale, rng)
        turned = rng.random() < views.flip
        parameters = draw(crops.photometric[min(i, len(crops.photometric) - 1)], rng, views.inverted_blur)
        crop = _resized(image, box, crops.size, turned)
        if in_place:
            crop = _recoloured(crop, parameters)
        else:
            later[i] = parameters
        pixels[i] = crop
        if plain_size:
            plain[i] = _resized(image, box, plain_size, turned)
    return Cut(pixels, later, plain)


def _resized(image: np.ndarray, box: tuple[int, int, int, int], size: int, turned: bool) -> np.ndarray:
    """A box of an image as a square, antialiased: torch's 8-bit kernel, several times as fast as Pillow's."""
    left, top, right, bottom = box
    crop = torch.from_numpy(image).permute(2, 0, 1)[None, :, top:bottom, left:right]
    square = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    return np.ascontiguousarray(square.flip(1) if turned else square)


def _recoloured(crop: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    from pretrain.data.recolour import recolour  # OpenCV, for which the training device has no use

    return recolour(crop, parameters)
