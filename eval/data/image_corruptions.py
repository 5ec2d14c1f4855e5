"""Images damaged in the ways of ImageNet-C (arXiv 1903.12261), on the fly.

The kinds and their strengths follow the paper; frost, which needs photographs of frost, is left out. Strengths are
meant for images of 224 pixels; what is measured in pixels is scaled to the image's side.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates, zoom
from skimage.color import hsv2rgb, rgb2hsv

Corruption = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
"""An image, float64 `[side, side, 3]` in 0 to 1, its severity 0 to 4, and chance, to the damaged image."""
_SIDE = 224
_SHORTEST = 1 / 3


def corrupt(image: np.ndarray, name: str, severity: int, generator: np.random.Generator) -> np.ndarray:
    """An image, uint8 `[side, side, 3]`, damaged.

    Args:
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
    """
    found = CORRUPTIONS[name](image / 255.0, severity - 1, generator)
    return (np.clip(found, 0, 1) * 255).round().astype(np.uint8)


def _gaussian_noise(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    return x + g.normal(size=x.shape, scale=(0.08, 0.12, 0.18, 0.26, 0.38)[s])


def _shot_noise(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    photons = (60, 25, 12, 5, 3)[s]
    return g.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    chance, found = g.random(x.shape), x.copy()
    amount = (0.03, 0.06, 0.09, 0.17, 0.27)[s]
    found[chance < amount / 2] = 0
    found[chance > 1 - amount / 2] = 1
    return found


def _speckle_noise(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    return x + x * g.normal(size=x.shape, scale=(0.15, 0.2, 0.35, 0.45, 0.6)[s])


def _defocus_blur(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    radius, soft = ((3.0, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[s]
    radius = max(radius * _clip_unit(x), 1.0)
    reach = int(np.ceil(radius))
    y, z = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = gaussian_filter((y**2 + z**2 <= radius**2).astype(float), soft)
    return cv2.filter2D(x, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)


def _gaussian_blur(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    sigma = (1, 2, 3, 4, 6)[s] * _clip_unit(x)
    return gaussian_filter(x, (sigma, sigma, 0))


def _glass_blur(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    sigma, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[s]
    sigma = sigma * _clip_unit(x)
    found = gaussian_filter(x, (sigma, sigma, 0))
    rows, columns = np.indices(x.shape[:2])
    for _ in range(times):  # every pixel takes the place of a near one
        moved = g.integers(-reach, reach + 1, (2, *x.shape[:2]))
        found = found[(rows + moved[0]).clip(0, len(x) - 1), (columns + moved[1]).clip(0, x.shape[1] - 1)]
    return gaussian_filter(found, (sigma, sigma, 0))


def _motion_blur(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[s]
    weights = _motion_kernel(radius * _clip_unit(x), sigma * _clip_unit(x))
    return _blur_along(x, g.uniform(-np.pi / 4, np.pi / 4), weights)


def _motion_kernel(radius: float, sigma: float) -> np.ndarray:
    """Weights of a motion: half a bell, 2 * radius + 1 pixels long."""
    places = np.arange(2 * max(round(radius), 1) + 1)
    return np.exp(-(places**2) / (2 * max(sigma, 0.3) ** 2))


def _blur_along(x: np.ndarray, angle: float, weights: np.ndarray) -> np.ndarray:
    """Mean of an image and of itself moved one way, step by step."""
    total = np.zeros_like(x)
    for distance, weight in enumerate(weights):
        shift = np.array([[1, 0, distance * np.cos(angle)], [0, 1, distance * np.sin(angle)]])
        total += weight * cv2.warpAffine(x, shift, x.shape[1::-1], borderMode=cv2.BORDER_REFLECT_101)
    return total / weights.sum()


def _zoom_blur(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    stop, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.33, 0.03))[s]
    factors = np.arange(1, stop, step)
    return np.mean([x, *(_zoom(x, factor) for factor in factors)], axis=0)


def _zoom(x: np.ndarray, factor: float) -> np.ndarray:
    """The middle of an image at its whole size."""
    middle = (np.array(x.shape[1::-1]) - 1) / 2
    matrix = np.array([[factor, 0, middle[0] * (1 - factor)], [0, factor, middle[1] * (1 - factor)]])
    return cv2.warpAffine(x, matrix, x.shape[1::-1], borderMode=cv2.BORDER_REFLECT_101)


def _snow(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    mean, std, scale, least, length, sigma, share = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[s]
    flakes = _zoom(g.normal(size=x.shape[:2], loc=mean, scale=std), scale)
    flakes[flakes < least] = 0
    weights = _motion_kernel(length * _clip_unit(x), sigma * _clip_unit(x))
    flakes = _blur_along(flakes.clip(0, 1), g.uniform(-3 * np.pi / 4, -np.pi / 4), weights)[..., None]
    gray = cv2.cvtColor(x.astype(np.float32), cv2.COLOR_RGB2GRAY)[..., None]
    paler = share * x + (1 - share) * np.maximum(x, gray * 1.5 + 0.5)
    return paler + flakes + np.rot90(flakes, 2)


def _fog(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    amount, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[s]
    cloud = amount * _plasma_fractal(max(x.shape[:2]), decay, g)[: x.shape[0], : x.shape[1], None]
    return (x + cloud) * x.max() / (x.max() + amount)


def _plasma_fractal(side: int, decay: float, g: np.random.Generator) -> np.ndarray:
    """Clouds in 0 to 1: noise of all scales, each finer one weaker by `decay`."""
    octaves = int(np.ceil(np.log2(side)))
    total = np.zeros((2**octaves, 2**octaves))
    for octave in range(1, octaves + 1):
        cells = 2**octave
        total += zoom(g.uniform(-1, 1, (cells, cells)), 2**octaves // cells, order=1) / decay**octave
    total -= total.min()
    return total / max(total.max(), 1e-9)


def _brightness(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    colors = rgb2hsv(x)
    colors[..., 2] = np.clip(colors[..., 2] + (0.1, 0.2, 0.3, 0.4, 0.5)[s], 0, 1)
    return hsv2rgb(colors)


def _saturate(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    factor, more = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))[s]
    colors = rgb2hsv(x)
    colors[..., 1] = np.clip(colors[..., 1] * factor + more, 0, 1)
    return hsv2rgb(colors)


def _contrast(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[s] + mean


def _elastic_transform(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    # Far moves that vary slowly at first, near ones that vary quickly at last; lengths in shares of the side.
    reach, smooth = ((2.0, 0.7), (2.0, 0.08), (0.05, 0.01), (0.07, 0.01), (0.12, 0.01))[s]
    side = len(x)
    moves = [
        gaussian_filter(g.uniform(-1, 1, x.shape[:2]), smooth * side, mode="reflect", truncate=3) for _ in range(2)
    ]
    moves = [each / max(np.abs(each).max(), 1e-9) * min(reach, 0.12) * side / 2 for each in moves]
    rows, columns = np.indices(x.shape[:2])
    places = [rows + moves[0], columns + moves[1]]
    return np.stack([map_coordinates(x[..., i], places, order=1, mode="reflect") for i in range(3)], -1)


def _pixelate(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[s]
    height, width = x.shape[:2]
    small = cv2.resize(x, (max(int(width * share), 1), max(int(height * share), 1)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


def _jpeg_compression(x: np.ndarray, s: int, g: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    image = Image.fromarray((x * 255).round().astype(np.uint8))
    image.save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[s])
    return np.asarray(Image.open(buffer)) / 255.0


def _clip_unit(x: np.ndarray) -> float:
    """How long a pixel of an image of 224 is here; in small images what is shorter would change nothing."""
    return max(len(x) / _SIDE, _SHORTEST)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "saturate": _saturate,
}
"""By the paper's names; the last three are its extra ones, which mCE leaves out."""
MCE_CORRUPTIONS = tuple(CORRUPTIONS)[:-3]
