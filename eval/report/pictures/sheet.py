"""Sheets of tiles."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

TILE = 144
_GAP = 4


def tile(image: Image.Image | np.ndarray, border: str | None = None, smooth: bool = True) -> Image.Image:
    """A square tile of the middle of an image, with a colored border or none."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
    fitted = ImageOps.fit(image, (TILE, TILE), how)
    return fitted if border is None else ImageOps.expand(ImageOps.crop(fitted, 4), 4, border)


def sheet(rows: Sequence[Sequence[Image.Image]]) -> bytes:
    """Tiles in rows, as PNG bytes."""
    columns = max(len(row) for row in rows)
    size = (columns * (TILE + _GAP) - _GAP, len(rows) * (TILE + _GAP) - _GAP)
    page = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, each in enumerate(row):
            page.paste(each, (x * (TILE + _GAP), y * (TILE + _GAP)))
    return png(page)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def spread(length: int, count: int) -> np.ndarray:
    """At most `count` rows, evenly spread over `length`."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(int))
