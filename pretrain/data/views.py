"""Views of one image: crops cut on the CPU, recolored there or with the parameters for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pretrain.data.color_gpu import sample_parameters
from pretrain.data.config import Crops, Views

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


@dataclass(frozen=True)
class Crop:
    """One random crop, before it is cut."""

    box: tuple[int, int, int, int]
    """left, top, right, bottom in pixels of the whole image"""
    flipped: bool
    """Flipped horizontally"""
    photometric: np.ndarray
    """float32 `[9]`: how it is recolored"""


def sample_crops(size: tuple[int, int], crops: Crops, count: int, views: Views, rng: np.random.Generator) -> list[Crop]:
    """Draw `count` crops of an image of some width and height."""
    return [
        Crop(
            resized_crop_box(*size, crops.scale, rng),
            bool(rng.random() < views.hflip_prob),
            sample_parameters(crops.photometric[min(i, len(crops.photometric) - 1)], rng, views.inverted_blur),
        )
        for i in range(count)
    ]


def safe_draft_scale(crops: Sequence[tuple[Crop, int]]) -> int:
    """The largest whole factor by which an image may shrink while each crop has as many pixels as its side asks."""
    sides = [min(crop.box[2] - crop.box[0], crop.box[3] - crop.box[1]) / size for crop, size in crops]
    return max(1, int(min(sides)))


@dataclass(frozen=True)
class CropSet:
    """Crops of one image."""

    pixels: np.ndarray
    """uint8 `[count, size, size, 3]`"""
    photometric: np.ndarray
    """float32 `[count, 9]`: how the training device has to recolor them; no rows where that is done"""
    gram_pixels: np.ndarray
    """uint8 `[count, plain size, plain size, 3]`: the same boxes, never recolored; none where no size is asked for"""


def extract_crops(
    image: np.ndarray,
    whole: tuple[int, int],
    crops: Sequence[Crop],
    size: int,
    views: Views,
    gram_size: int | None = None,
) -> CropSet:
    """Cut crops of an image.

    Args:
        image: uint8 `[h, w, 3]`, perhaps smaller than it was.
        whole: its width and height before, in which the boxes are.
        size: side of the crops in pixels.
        plain: side of further crops that are not recolored.
    """
    in_place = views.color_augment_on == "workers"
    pixels = np.empty((len(crops), size, size, 3), dtype=np.uint8)
    further = np.empty((len(crops) if gram_size else 0, gram_size or 0, gram_size or 0, 3), dtype=np.uint8)
    for i, crop in enumerate(crops):
        box = _scale_box(crop.box, image.shape[1] / whole[0], image.shape[0] / whole[1])
        square = _resize(image, box, size, crop.flipped)
        pixels[i] = _adjust_color(square, crop.photometric) if in_place else square
        if gram_size:
            further[i] = _resize(image, box, gram_size, crop.flipped)
    later = np.empty((0, 9), dtype=np.float32) if in_place else np.reshape([c.photometric for c in crops], (-1, 9))
    return CropSet(pixels, later.astype(np.float32), further)


def _scale_box(box: tuple[int, int, int, int], across: float, down: float) -> tuple[int, int, int, int]:
    """A box in an image that was shrunk, of at least one pixel."""
    left, top = int(box[0] * across), int(box[1] * down)
    return left, top, max(left + 1, round(box[2] * across)), max(top + 1, round(box[3] * down))


def _resize(image: np.ndarray, box: tuple[int, int, int, int], size: int, flipped: bool) -> np.ndarray:
    """A box of an image as a square, antialiased: torch's 8-bit kernel, several times as fast as Pillow's."""
    left, top, right, bottom = box
    crop = torch.from_numpy(image).permute(2, 0, 1)[None, :, top:bottom, left:right]
    square = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    return np.ascontiguousarray(square.flip(1) if flipped else square)


def _adjust_color(crop: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    from pretrain.data.color_cpu import adjust_color

    return adjust_color(crop, parameters)
