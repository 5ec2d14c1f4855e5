"""Photometric augmentation of whole batches, on the device that trains, with parameters drawn per image.

The operations are those of torchvision's ColorJitter, RandomGrayscale, GaussianBlur, RandomSolarize, RandomInvert and
RandomChannelPermutation. Jitter's four operations run in a fixed order (brightness, contrast, saturation, hue).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.config import Photometric

# Columns of a parameter table.
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, BLUR, SOLARIZE, INVERT, CHANNELS = range(9)
_NEUTRAL = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0], dtype=np.float32)
CHANNEL_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
BLUR_SIZE = 9  # pixels of the kernel's side, as in DINOv2
GRAY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601, as in torchvision and Pillow


def neutral_parameters() -> np.ndarray:
    """Parameters that leave an image as it is, float32 `[9]`."""
    return _NEUTRAL.copy()


def sample_parameters(spec: Photometric, rng: np.random.Generator, inverted_blur: bool = False) -> np.ndarray:
    """Parameters for one image, float32 `[9]`."""
    blur = 1 - spec.blur_prob if inverted_blur else spec.blur_prob
    values = neutral_parameters()
    chance = rng.random(6)
    if chance[0] < spec.jitter_prob:
        strength = np.array([spec.brightness, spec.contrast, spec.saturation])
        values[:3] = rng.uniform(np.maximum(0, 1 - strength), 1 + strength)
        values[HUE] = rng.uniform(-spec.hue, spec.hue)
    values[GRAY] = chance[1] < spec.grayscale_prob
    values[BLUR] = rng.uniform(0.1, 2.0) if chance[2] < blur else 0
    values[SOLARIZE] = chance[3] < spec.solarize_prob
    values[INVERT] = chance[4] < spec.invert_prob
    values[CHANNELS] = rng.integers(1, 6) if chance[5] < spec.channel_shuffle_prob else 0
    return values


def apply(images: Tensor, parameters: Tensor) -> Tensor:
    """Augment a batch.

    Args:
        images: `[n, 3, h, w]`, float, 0 to 1.
        parameters: `[n, 9]` from `sample_parameters`.

    Returns:
        A new tensor of the same shape and range.
    """
    images = _jitter(images, parameters)
    images = _where(images, parameters[:, GRAY] > 0, lambda x, _: _to_gray(x).expand_as(x))
    images = _where(images, parameters[:, BLUR] > 0, lambda x, rows: _blur(x, parameters[rows, BLUR]))
    images = _where(images, parameters[:, SOLARIZE] > 0, lambda x, _: torch.where(x >= 128 / 255, 1 - x, x))
    images = _where(images, parameters[:, INVERT] > 0, lambda x, _: 1 - x)
    return _where(images, parameters[:, CHANNELS] > 0, lambda x, rows: _reorder(x, parameters[rows, CHANNELS]))


def _where(images: Tensor, chosen: Tensor, change) -> Tensor:  # type: ignore[no-untyped-def]
    rows = chosen.nonzero().squeeze(1)
    if len(rows) == 0:
        return images
    return images.index_copy(0, rows, change(images[rows], rows).to(images.dtype))


def _jitter(images: Tensor, parameters: Tensor) -> Tensor:
    brightness, contrast, saturation = (parameters[:, column, None, None, None] for column in range(3))
    images = (images * brightness).clamp(0, 1)
    mean = _to_gray(images).mean(dim=(1, 2, 3), keepdim=True)
    images = (images * contrast + mean * (1 - contrast)).clamp(0, 1)
    images = (images * saturation + _to_gray(images) * (1 - saturation)).clamp(0, 1)
    return _where(images, parameters[:, HUE] != 0, lambda x, rows: _shift_hue(x, parameters[rows, HUE]))


def _to_gray(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (GRAY_WEIGHTS[0] * red + GRAY_WEIGHTS[1] * green + GRAY_WEIGHTS[2] * blue).unsqueeze(1)


def _shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Add `turns` (share of the circle) to the hue of each image, in HSV."""
    red, green, blue = images.unbind(1)
    value, brightest = images.max(1)
    chroma = value - images.min(1).values
    scale = 1 / chroma.clamp_min(1e-8)
    sixths = torch.where(
        brightest == 0,
        (green - blue) * scale,
        torch.where(brightest == 1, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    sixths = sixths + 6 * turns[:, None, None]
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device)[None, :, None, None]
    position = (offsets + sixths.unsqueeze(1)) % 6
    share = torch.minimum(position, 4 - position).clamp(0, 1)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * share


def _blur(images: Tensor, sigmas: Tensor, size: int = BLUR_SIZE) -> Tensor:
    """Gaussian blur with one sigma an image and a kernel of `size` pixels."""
    n, channels, height, width = images.shape
    size = min(size, 2 * min(height, width) - 1)
    offsets = torch.arange(size, device=images.device) - size // 2
    kernel = torch.exp(-0.5 * (offsets / sigmas[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    pad = size // 2
    flat = F.pad(images, (pad, pad, pad, pad), mode="reflect").reshape(
        1, n * channels, height + 2 * pad, width + 2 * pad
    )
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=n * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=n * channels)
    return flat.reshape(images.shape)


def _reorder(images: Tensor, orders: Tensor) -> Tensor:
    order = torch.tensor(CHANNEL_ORDERS, device=images.device)[orders.long()]
    return images.gather(1, order[:, :, None, None].expand_as(images))
