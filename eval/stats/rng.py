"""Draws that are a function of seed, purpose and position."""

from __future__ import annotations

import zlib

import numpy as np


def make_rng(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A generator for one purpose at one position."""
    entropy = np.random.SeedSequence((seed, zlib.crc32(purpose.encode()), *position))
    return np.random.Generator(np.random.Philox(entropy))
