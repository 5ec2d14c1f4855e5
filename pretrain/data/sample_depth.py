"""Images of more than 8 bits a sample: which of their values is black and which is white."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from infra.config import Config
from pretrain.data.image_metadata import PNG_SIGNATURE

DEEP_MODES = ("I", "F")  # and I;16 in its byte orders
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_FORMAT = 258, 262, 339
_TIFF_RANGES = ((340, 341), (280, 281))  # lowest and highest sample value: by their type, or as 16-bit numbers
_WHITE_IS_ZERO = 0
_UNSIGNED = 1


class DepthSettings(Config):
    """How samples of more than 8 bits become 8-bit ones, where a file does not declare it."""

    bit_depth: int | None = None
    """Significant bits of integer samples; the values from 0 to 2 ** bits - 1 span black to white."""
    window: tuple[float, float] | None = None
    """Sample values that become black and white; values outside are cut."""

    def span(self) -> tuple[float, float] | None:
        """The values that become black and white; None where nothing is set."""
        if self.window is not None:
            return self.window
        return None if self.bit_depth is None else (0.0, float(2**self.bit_depth - 1))


class UnknownDepth(Exception):
    """A file does not declare which of its values is black or white."""


def is_deep_gray(image: Image.Image) -> bool:
    """Whether an image has one channel of more than 8 bits."""
    return image.mode in DEEP_MODES or image.mode.startswith("I;16")


def gray_to_8_bits(values: np.ndarray, header: Image.Image, settings: DepthSettings) -> np.ndarray:
    """Gray samples of any depth as uint8 of the same shape.

    Args:
        values: `[H, W]`.
        header: the image they were decoded from.

    Raises:
        UnknownDepth: the file does not declare their range, and neither do the settings.
    """
    low, high = settings.span() or _declared_span(values, header)
    scaled = (np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low) - low) * (255 / (high - low))
    gray = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    return 255 - gray if _is_inverted(header) else gray


def _declared_span(values: np.ndarray, header: Image.Image) -> tuple[float, float]:
    """Lowest and highest value by the file's own declaration.

    16 bits that are declared hold 10- or 12-bit values in many files. Where the highest bit is used they are 16 bits
    for certain; where it is not, nobody can know.
    """
    if header.format in ("JPEG2000", "PPM") and header.mode != "F":
        return 0.0, 65535.0  # Pillow scales by the declared maximum
    if header.format == "TIFF":
        span = _tiff_span(header)
        if span is not None:
            return span
    elif header.mode == "F" or not header.mode.startswith("I"):
        raise UnknownDepth
    if not values.size or values.max() < 1 << 15:
        raise UnknownDepth
    return 0.0, 65535.0


def _tiff_span(header: Image.Image) -> tuple[float, float] | None:
    """What the tags of a TIFF declare; None for 16 unsigned bits and nothing else."""
    tags: Any = header.tag_v2  # type: ignore[attr-defined]
    for low, high in _TIFF_RANGES:
        if high in tags:
            span = _number(tags.get(low, 0)), _number(tags[high])
            if span[1] > span[0]:
                return span
    bits, kind = int(_number(tags.get(_TIFF_BITS, 1))), int(_number(tags.get(_TIFF_FORMAT, _UNSIGNED)))
    if kind != _UNSIGNED or bits > 16:
        raise UnknownDepth
    return None if bits == 16 else (0.0, float(2**bits - 1))


def _number(value: Any) -> float:
    return float(value[0] if isinstance(value, tuple) else value)


def _is_inverted(header: Image.Image) -> bool:
    return header.format == "TIFF" and _tag(header, _TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO


def _tag(header: Image.Image, number: int) -> Any:
    return getattr(header, "tag_v2", {}).get(number)


def has_16_bit_channels(header: Image.Image, data: bytes) -> bool:
    """Whether an image of several channels was declared with 16 bits, of which Pillow decodes the upper 8."""
    if header.format == "PNG" and data.startswith(PNG_SIGNATURE):
        return len(data) > 25 and data[24] == 16 and data[25] in (2, 4, 6)
    bits = _tag(header, _TIFF_BITS) if header.format == "TIFF" else None
    return isinstance(bits, tuple) and len(bits) > 1 and max(bits) == 16


def color_to_8_bits(data: bytes, settings: DepthSettings) -> np.ndarray | None:
    """RGB of 16 bits a channel as uint8 `[H, W, 3]` by the settings' span, not turned; None where nothing is set."""
    span = settings.span()
    if span is None:
        return None
    import cv2

    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3 or values.shape[2] < 3:
        raise UnknownDepth
    scaled = (values[..., 2::-1].astype(np.float64) - span[0]) * (255 / (span[1] - span[0]))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def require_full_depth(upper: np.ndarray) -> None:
    """Check that the upper 8 of 16 bits, `[H, W, channels]`, use the highest one; see `gray_to_8_bits`.

    Raises:
        UnknownDepth: they do not: the values may be of 10 or 12 bits.
    """
    if not upper.size or upper.max() < 1 << 7:
        raise UnknownDepth
