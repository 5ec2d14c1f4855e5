"""Copies by perceptual hash: what looks the same at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from curation.context import Context
from curation.image_stats import SIDE, pca_hash
from curation.similarity.forest import Forest
from curation.similarity.hamming import pairs_within
from curation.steps.config import Perceptual
from curation.steps.image_quality import read_stats
from curation.steps.representative import count_pixels, first_of_each, sort_best_first
from infra.errors import UserError

_SAMPLE = 20_000  # pictures that principal components are learned from
_FEWEST = 100
_BITS = 64


def perceptual(context: Context, step: Perceptual) -> Mapping[str, Any]:
    """Of images that hang together by hashes with few different bits, keep the largest."""
    verdicts = context.state
    stats = read_stats(context, ["phash", "entropy"] if step.hash == "dct" else ["small", "entropy"])
    entropy = stats["entropy"].to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(verdicts.keep & (entropy >= step.min_entropy))  # NaN, where there is no picture, is not
    hashes = _hashes(context, stats, rows, step)
    different, place = np.unique(hashes, return_inverse=True)
    forest = Forest(len(different))
    for a, b, bits in pairs_within(different, step.radius):
        forest.add(a, b, 1 - bits.astype(np.float32) / _BITS)
    component = forest.components()[place]
    order = sort_best_first(context, rows, component, count_pixels(context, rows))
    rows, hashes, component = rows[order], hashes[order], component[order]
    winner = first_of_each(component)
    losers = np.flatnonzero(winner != np.arange(len(rows)))
    likeness = 1 - np.bitwise_count(hashes[losers] ^ hashes[winner[losers]]) / _BITS
    verdicts.merge(rows[losers], rows[winner[losers]], step.kind, "perceptual_duplicate", likeness)
    return {
        "dropped": len(losers),
        "different_hashes": len(different),
        "not_hashed": int(verdicts.keep.sum()) - len(np.unique(component)),
    }


def _hashes(context: Context, stats: pa.Table, rows: np.ndarray, step: Perceptual) -> np.ndarray:
    if step.hash == "dct":
        return stats["phash"].take(pa.array(rows)).to_numpy()
    sample = _pictures(stats, context.shuffled(rows, _SAMPLE))
    if len(np.unique(sample, axis=0)) < _FEWEST:
        raise UserError(f"perceptual: hash: pca needs {_FEWEST} different images to learn from; use dct")
    return pca_hash(_pictures(stats, rows), sample)


def _pictures(stats: pa.Table, rows: np.ndarray) -> np.ndarray:
    taken = stats["small"].take(pa.array(rows)).combine_chunks()
    return np.frombuffer(taken.buffers()[1], dtype=np.uint8)[: len(rows) * SIDE * SIDE].reshape(len(rows), SIDE * SIDE)
