"""Crops and normalization that backbones share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_MOST_ASPECT = 16


class Normalizer:
    """Images, uint8 `[n, H, W, 3]`, to normalized ones, float32 `[n, 3, H, W]`."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean, self._std = (torch.tensor(each).view(1, 3, 1, 1) for each in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (each.to(images.device) for each in (self._mean, self._std))
        return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def trim_aspect(image: Image.Image) -> Image.Image:
    """The middle of an image of more than `_MOST_ASPECT` times its shorter side; any other one as it is.

    Resizing the shorter side of a strip first, as the transforms of all libraries do, would take gigabytes for pixels
    that the center crop cuts off.
    """
    shorter, longer = sorted(image.size)
    if longer <= _MOST_ASPECT * shorter:
        return image
    start = (longer - _MOST_ASPECT * shorter) // 2
    ends = (start, start + _MOST_ASPECT * shorter)
    box = (0, ends[0], shorter, ends[1]) if image.height > image.width else (ends[0], 0, ends[1], shorter)
    return image.crop(box)


def center_crop(image: Image.Image, side: int) -> np.ndarray:
    """The middle square of an image at a given side, uint8 `[side, side, 3]`.

    Larger sides keep a border of one eighth, as in ImageNet's 256 to 224; small ones, where it would be a few pixels,
    keep none.
    """
    image = trim_aspect(image)
    resize = round(side * 256 / 224) if side >= 64 else side
    # The longer side is rounded down and the middle to even, as torchvision, and so timm, does.
    width, height = (resize if each == min(image.size) else int(each * resize / min(image.size)) for each in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side)))
