"""Masks as they are and as they were found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from eval.report.pictures.sheet import sheet, tile
from infra.corpus.corpus import Corpus
from pretrain.data.images import read_image


def mask_sheet(corpus: Corpus, shown: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> bytes:
    """Images above their true masks and the found ones.

    Args:
        shown: rows with found and true class of each pixel, `[H, W]`.
    """
    images = [tile(read_image(corpus, row)) for row, _, _ in shown]
    found = [tile(_colorize(each), smooth=False) for _, each, _ in shown]
    truths = [tile(_colorize(each), smooth=False) for _, _, each in shown]
    return sheet([images, truths, found])


def _colorize(classes: np.ndarray) -> Image.Image:
    """A color for each class, the same in every picture; 0 and 255 are pale."""
    number = np.arange(256)
    palette = np.stack([(number * step) % 200 + 30 for step in (67, 113, 199)], 1).astype(np.uint8)
    palette[0], palette[255] = (238, 241, 243), (205, 210, 214)
    return Image.fromarray(palette[classes.astype(np.int64) % 256])
