"""Photometric augmentation of one crop on the CPU, in 8 bits, rounding after each operation as Pillow does.

The operations, their order and their parameters are those of `pretrain.data.color_gpu`, which does the same in
floating point for whole batches on the training device.
"""

from __future__ import annotations

import cv2
import numpy as np

from pretrain.data.color_gpu import (
    BLUR,
    BLUR_SIZE,
    BRIGHTNESS,
    CHANNEL_ORDERS,
    CHANNELS,
    CONTRAST,
    GRAY,
    GRAY_WEIGHTS,
    HUE,
    INVERT,
    SATURATION,
    SOLARIZE,
)

# Crops are too small for threads, and a pool of them would hang in the loader's forks. Set before the first use.
cv2.setNumThreads(1)

_VALUES = np.arange(256, dtype=np.float32)
_SOLARIZED = np.where(_VALUES >= 128, 255 - _VALUES, _VALUES).astype(np.uint8)


def adjust_color(crop: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """Augment one crop.

    Args:
        crop: uint8 `[h, w, 3]`, contiguous.
        parameters: float32 `[9]` from `photometric.sample_parameters`.

    Returns:
        uint8 `[h, w, 3]`; the crop itself where nothing is to be done.
    """
    crop = _jitter(crop, parameters)
    if parameters[GRAY]:
        crop = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if parameters[BLUR]:
        size = min(BLUR_SIZE, 2 * min(crop.shape[:2]) - 1)
        sigma = float(parameters[BLUR])
        crop = cv2.GaussianBlur(crop, (size, size), sigma, borderType=cv2.BORDER_REFLECT_101)
    if parameters[SOLARIZE]:
        crop = cv2.LUT(crop, _SOLARIZED)
    if parameters[INVERT]:
        crop = cv2.bitwise_not(crop)
    if parameters[CHANNELS]:
        crop = crop[..., CHANNEL_ORDERS[int(parameters[CHANNELS])]]
    return crop


def _jitter(crop: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    brightness, contrast, saturation, hue = (
        float(parameters[column]) for column in (BRIGHTNESS, CONTRAST, SATURATION, HUE)
    )
    if brightness != 1:
        crop = cv2.LUT(crop, _table(_VALUES * brightness))
    if contrast != 1:
        mean = float(np.dot(GRAY_WEIGHTS, cv2.mean(crop)[:3]))
        crop = cv2.LUT(crop, _table(_VALUES * contrast + mean * (1 - contrast)))
    if saturation != 1:
        gray = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        crop = cv2.addWeighted(crop, saturation, gray, 1 - saturation, 0)
    if hue != 0:
        hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
        hsv[..., 0] += np.uint8(round(hue * 256) % 256)  # 256 steps are the whole circle, so overflow is the turn
        crop = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return crop


def _table(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
