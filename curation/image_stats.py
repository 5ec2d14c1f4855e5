"""What a small picture of each image tells: perceptual hashes, and whether there is anything to be seen on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curation.similarity.tiles import WorkerPool
from infra.corpus.corpus import BadImage, Corpus
from infra.storage.atomic import atomic_write, prune_older_than
from pretrain.data.decode import AS_DECLARED, ImageRejected, decode, open_image, upright_size
from pretrain.data.images import depth_settings
from pretrain.data.sample_depth import DepthSettings

VERSION = 3
SIDE = 32  # of the small picture, in pixels
_FREQUENCIES = 8
_DECODE_SIDE = 128  # pixels of the shorter side below which no decoder is asked to shrink
_LAPLACIAN = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=np.float32)
_BLOCK = 1024  # images of a file
SCHEMA = pa.schema(
    [
        ("phash", pa.uint64()),  # null, as all, where the image cannot be decoded
        ("entropy", pa.float32()),  # of the gray values, in bits: 0 for one color, 8 at most
        ("sharpness", pa.float32()),  # standard deviation of the Laplacian, in gray values of 0 to 255
        ("small", pa.binary(SIDE * SIDE)),  # the small picture, uint8
    ]
)


class ImageStats:
    """Statistics of a corpus, each image decoded once, at the smallest scale that will do.

    Finished parts are kept, so that an interrupted pass goes on and a later one finds them.

    Args:
        directory: where they are kept.
    """

    def __init__(self, corpus: Corpus, directory: Path) -> None:
        self.corpus = corpus
        self._folder = directory / f"{corpus.artifact.id}-{VERSION}"
        self._folder.mkdir(parents=True, exist_ok=True)
        os.utime(self._folder)
        prune_older_than(directory)

    def table(self, workers: WorkerPool, reach: Callable[[float], object], columns: list[str]) -> pa.Table:
        """Some columns, a row an image; what is not there yet is made."""
        starts = range(0, len(self.corpus), _BLOCK)
        for number, _ in enumerate(workers.map(self._measure, starts)):
            reach((number + 1) / len(starts))
        return pa.concat_tables([pq.read_table(self._path(start), columns=columns) for start in starts])

    def _path(self, start: int) -> Path:
        return self._folder / f"{start:010d}.parquet"

    def _measure(self, start: int) -> None:
        if self._path(start).exists():
            return
        rows = range(start, min(start + _BLOCK, len(self.corpus)))
        table = measure_images(list(self._pictures(rows)))
        with atomic_write(self._path(start)) as partial:
            pq.write_table(table, partial)

    def _pictures(self, rows: range) -> Iterator[np.ndarray | None]:
        for row, image in zip(rows, self.corpus.read_images(rows), strict=True):
            # What is kept must not hang on a shard that was damaged for a while: this says so and stops.
            data = self.corpus.read_image(row) if isinstance(image, BadImage) else image
            yield load_gray(data, depth_settings(self.corpus))


def load_gray(data: bytes, depth: DepthSettings = AS_DECLARED) -> np.ndarray | None:
    """An encoded image in gray, uint8 `[height, width]`, at a reduced scale where that is cheaper; None if it cannot
    be decoded."""
    try:
        image = open_image(data)
        shrink = max(min(upright_size(image)) // _DECODE_SIDE, 1)
        return np.asarray(decode(image, shrink, gray=True, depth=depth))
    except ImageRejected:
        return None


def measure_images(pictures: list[np.ndarray | None]) -> pa.Table:
    """Statistics of gray pictures, with the columns of `SCHEMA`."""
    there = np.array([picture is not None for picture in pictures])
    seen = [picture for picture in pictures if picture is not None]
    small = np.zeros((len(pictures), SIDE, SIDE), dtype=np.uint8)
    entropy, sharpness = np.zeros(len(pictures)), np.zeros(len(pictures))
    if seen:
        images = [Image.fromarray(picture) for picture in seen]
        small[there] = [_shrink(image) for image in images]
        entropy[there] = _entropies(np.array([image.histogram() for image in images]))
        sharpness[there] = [_sharpness(picture) for picture in seen]
    raw = [each.tobytes() for each in small]
    columns = (phash(small), entropy.astype(np.float32), sharpness.astype(np.float32), pa.array(raw, SCHEMA.types[3]))
    return pa.table([_where(pa.array(column), there) for column in columns], schema=SCHEMA)


def _where(column: pa.Array, there: np.ndarray) -> pa.Array:
    import pyarrow.compute as pc

    return pc.if_else(pa.array(there), column, None)


def _shrink(image: Image.Image) -> np.ndarray:
    if image.width % SIDE == 0 and image.height % SIDE == 0:  # the same, four times as fast
        return np.asarray(image.reduce((image.width // SIDE, image.height // SIDE)))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def _entropies(counts: np.ndarray) -> np.ndarray:
    """Bits of histograms, int64 `[n, 256]`."""
    shares = counts / counts.sum(axis=1, keepdims=True)
    return -(shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum(axis=1)


def _sharpness(picture: np.ndarray) -> float:
    if min(picture.shape) < 3:
        return 0.0
    inner = cv2.filter2D(picture, cv2.CV_16S, _LAPLACIAN)[1:-1, 1:-1]
    mean, square = cv2.sumElems(inner)[0] / inner.size, cv2.norm(inner, cv2.NORM_L2SQR) / inner.size
    return float(np.sqrt(max(square - mean**2, 0.0)))


def phash(small: np.ndarray) -> np.ndarray:
    """64-bit perceptual hashes of small pictures, uint8 `[n, 32, 32]`; uint64 `[n]`.

    Which of the 8 by 8 lowest frequencies of the discrete cosine transform are above their median, the mean apart
    (Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010).
    """
    transform = _cosines()
    low = (transform @ small.astype(np.float64) @ transform.T).reshape(len(small), -1)
    median = np.median(low[:, 1:], axis=1, keepdims=True)
    return np.packbits(low > median, axis=1).view(">u8").astype(np.uint64).ravel()


@cache
def _cosines() -> np.ndarray:
    from scipy.fft import dct

    return dct(np.eye(SIDE), axis=0, norm="ortho")[:_FREQUENCIES]


def pca_hash(small: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """64-bit hashes of small pictures, uint8 `[n, 1024]`: on which side of the mean they lie along each of the 64
    principal components of a sample; uint64 `[n]`.

    DINOv2 names a "PCA hash" without saying what it is; this is one reading of it.
    """
    wide = sample.astype(np.float64)
    wide -= wide.mean(axis=1, keepdims=True)  # brightness is no property of the picture
    mean = wide.mean(axis=0)
    _, components = np.linalg.eigh((wide - mean).T @ (wide - mean))
    bits = []
    for start in range(0, len(small), _BLOCK):
        block = small[start : start + _BLOCK].astype(np.float64)
        block -= block.mean(axis=1, keepdims=True)
        bits.append((block - mean) @ components[:, -64:] > 0)
    return np.packbits(np.concatenate(bits), axis=1).view(">u8").astype(np.uint64).ravel()
