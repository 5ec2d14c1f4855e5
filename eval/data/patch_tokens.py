"""Patch tokens of many images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PatchTokenGrids:
    """Patch tokens of the images of a dataset, float16 `[n, h, w, dim]`, on disk where they are many."""

    tokens: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[1], self.tokens.shape[2]

    def flat(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of some images one after another, float32 `[rows * h * w, dim]`."""
        return self.tokens[rows].reshape(-1, self.tokens.shape[-1]).astype(np.float32)
