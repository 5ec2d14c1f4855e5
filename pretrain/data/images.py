"""Decoded images of a corpus by row. All readers treat one that cannot be decoded alike: it is passed over, counted and
named, or ends the stage in one line with its key where every image is needed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image

from infra.artifacts.artifact import cache_directory
from infra.corpus.corpus import BadImage, Corpus
from infra.errors import UserError
from infra.progress import progress
from infra.storage.atomic import cached_json
from pretrain.data.decode import ImageRejected, decode_rgb
from pretrain.data.sample_depth import DepthSettings

_TOGETHER = 64  # images read at a time

_log = logging.getLogger(__name__)


def depth_settings(corpus: Corpus) -> DepthSettings:
    """What samples of more than 8 bits mean in a corpus's images."""
    return DepthSettings(bit_depth=corpus.decoding.get("bit_depth"), window=corpus.decoding.get("window"))


def decode_image(corpus: Corpus, data: bytes | BadImage) -> Image.Image | BadImage:
    """An encoded image of a corpus as 8-bit RGB, upright; why, where it cannot be decoded."""
    if isinstance(data, BadImage):
        return data
    try:
        return decode_rgb(data, depth=depth_settings(corpus))
    except ImageRejected as error:
        return BadImage(error.reason)


def read_images(corpus: Corpus, rows: Sequence[int]) -> list[Image.Image | BadImage]:
    """The images of some rows, read together; in the place of one that cannot be used, why."""
    return [decode_image(corpus, data) for data in corpus.read_images(rows)]


def read_image(corpus: Corpus, row: int) -> Image.Image:
    """The image of one row.

    Raises:
        UserError: it cannot be read or decoded.
    """
    image = decode_image(corpus, corpus.read_image(row))
    if isinstance(image, BadImage):
        raise UserError(
            f"{corpus.artifact.url}: the image {corpus.key(row)} cannot be decoded ({image.reason}); ingest with "
            "--check pixels, which leaves such images out"
        )
    return image


def first_images(corpus: Corpus, count: int) -> list[Image.Image]:
    """The first images of a corpus that can be decoded, at most `count`.

    Raises:
        UserError: none can be.
    """
    images: list[Image.Image] = []
    for row in range(len(corpus)):
        (image,) = read_images(corpus, [row])
        if not isinstance(image, BadImage):
            images.append(image)
        if len(images) == count:
            return images
    if not images:
        raise UserError(f"{corpus.artifact.url}: holds no image that can be decoded; ingest with --check pixels")
    return images


def decodable_rows(corpus: Corpus) -> Corpus:
    """A corpus without the images that cannot be decoded, which are counted and named in a warning.

    Images that were decoded when the corpus was made are not decoded again; the verdict on others is cached.
    """
    if corpus.decoding.get("decoded", True):
        return corpus
    bad = _undecodable(corpus)
    if not bad:
        return corpus
    reasons = Counter(bad.values())
    keys = ", ".join(corpus.key(row) for row in sorted(bad)[:3]) + (", ..." if len(bad) > 3 else "")
    _log.warning(
        "%s: %d of %d images cannot be decoded and are left out (%s): %s",
        corpus.artifact.url,
        len(bad),
        len(corpus),
        ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())),
        keys,
    )
    return corpus.subset(np.setdiff1d(np.arange(len(corpus)), list(bad)))


def _undecodable(corpus: Corpus) -> dict[int, str]:
    """Rows that cannot be decoded, and why."""
    path = cache_directory() / "undecodable" / f"{corpus.artifact.id}.json"

    def find() -> dict[str, str]:
        bad: dict[str, str] = {}
        with progress("decode", len(corpus)) as advance:
            for start in range(0, len(corpus), _TOGETHER):
                rows = range(start, min(start + _TOGETHER, len(corpus)))
                for row, image in zip(rows, read_images(corpus, rows), strict=True):
                    if isinstance(image, BadImage):
                        bad[str(row)] = image.reason
                advance(len(rows))
        return bad

    return {int(row): reason for row, reason in cached_json(path, find).items()}
