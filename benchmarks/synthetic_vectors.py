"""Vectors like those of copy-detection networks, with near-duplicates whose truth is known."""

from __future__ import annotations

import numpy as np

_LARGEST = 400  # copies of one image


def planted(rows: int, dim: int, seed: int, concept_weight: float) -> np.ndarray:
    """Unit vectors, float16 `[rows, dim]`, a fifth of them copies with a cosine of 0.62 and more to their source.

    Args:
        concept_weight: how far images of one concept lie together; concepts have Zipf's sizes. With 0 images lie
            anywhere, the hardest case for anything that looks only near by.
    """
    rng = np.random.default_rng(seed)
    concepts = max(50, rows // 200)
    share = 1.0 / np.arange(1, concepts + 1) ** 0.8
    centers = _unit(rng.standard_normal((concepts, dim), dtype=np.float32))
    images = rows * 4 // 5
    base = _unit(rng.standard_normal((images, dim), dtype=np.float32))
    base = _unit(base + concept_weight * centers[rng.choice(concepts, images, p=share / share.sum())])
    of = np.repeat(np.arange(images), _sizes(rows, images, rng))
    copy = np.concatenate([[False], of[1:] == of[:-1]])
    cosine = np.where(copy, rng.uniform(0.62, 0.995, rows), 1.0).astype(np.float32)
    cosine[rng.random(rows) < 0.15] = 1.0
    source = base[of]
    noise = rng.standard_normal(source.shape, dtype=np.float32)
    noise = _unit(noise - (noise * source).sum(1, keepdims=True) * source)
    vectors = _unit(cosine[:, None] * source + np.sqrt(1 - cosine**2)[:, None] * noise)
    return vectors[rng.permutation(rows)].astype(np.float16)


def _sizes(rows: int, images: int, rng: np.random.Generator) -> np.ndarray:
    """Images of each component: most are alone, the others as many as Zipf's law has it."""
    more = np.minimum(rng.zipf(1.9, images), _LARGEST) - 1
    order = rng.permutation(images)
    left = rows - images
    sizes = np.ones(images, dtype=np.int64)
    sums = np.cumsum(more[order])
    sizes[order] += np.clip(left - (sums - more[order]), 0, more[order])
    return sizes


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
