"""Perceptual hashes, entropy and sharpness beside decoding alone, on one core: JPEGs of 256 pixels a side."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from benchmarks import report
from benchmarks.report import Row, cpu_seconds
from curation.image_stats import load_gray, measure_images
from curation.synthetic.corpus import load_photographs

_IMAGES, _SIDE = 1500, 256


def _images() -> list[bytes]:
    rng = np.random.default_rng(0)
    photographs = [each for each in load_photographs().values() if min(each.shape[:2]) > _SIDE]
    found = []
    for _ in range(_IMAGES):
        picture = photographs[rng.integers(len(photographs))]
        top, left = (int(rng.integers(0, side - _SIDE)) for side in picture.shape[:2])
        buffer = io.BytesIO()
        Image.fromarray(picture[top : top + _SIDE, left : left + _SIDE]).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def _decode(images: list[bytes]) -> None:
    """The least that any hash needs: the gray values at half the scale."""
    for data in images:
        image = Image.open(io.BytesIO(data))
        image.draft("L", (_SIDE // 2, _SIDE // 2))
        np.asarray(image)


def measure() -> Sequence[Row]:
    images = _images()
    ours, peer = cpu_seconds(lambda: measure_images([load_gray(each) for each in images]), lambda: _decode(images))
    return [
        Row("images a CPU second", _IMAGES / ours, "", _IMAGES / peer, peer / ours, 0.8),
    ]


if __name__ == "__main__":
    report.main("Perceptual hashing beside decoding alone", measure)
