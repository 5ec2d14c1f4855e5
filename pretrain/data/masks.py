"""Block masks over patch tokens (BEiT, arXiv 2106.08254, algorithm 1) as iBOT and DINOv2 draw them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pretrain.data.config import Views


@dataclass(frozen=True)
class MaskSettings:
    """How the patch tokens of global crops are masked."""

    patch_size: int
    probability: float
    """Share of crops with a mask."""
    ratio: tuple[float, float]
    """Least and largest share of masked patches in them."""
    exact: bool
    """Mask exactly the number asked for (DINOv3); else blocks alone, which may fall short (DINOv2)."""
    shift: bool
    """Shift masks around the edges."""

    @classmethod
    def from_config(cls, views: Views, patch_size: int) -> MaskSettings:
        """As the settings of the views say."""
        exact = views.mask_sampler == "dinov3"
        return cls(patch_size, views.mask_probability, views.mask_ratio, exact, views.mask_shift)


def block_mask(height: int, width: int, target: int, rng: np.random.Generator) -> np.ndarray:
    """A mask of rectangles covering at most `target` patches, bool `[height, width]`.

    Rectangles have at least 4 patches and a log-uniform aspect between 0.3 and 1/0.3; drawing stops when ten in a row
    add nothing, so the mask may fall short of its target.
    """
    mask = np.zeros((height, width), dtype=bool)
    log_aspect = (math.log(0.3), math.log(1 / 0.3))
    largest = 0.5 * height * width
    while (remaining := target - int(mask.sum())) > 0:
        for _ in range(10):
            area = rng.uniform(min(4, remaining), min(remaining, largest))
            aspect = math.exp(rng.uniform(*log_aspect))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < h < height and 0 < w < width):
                continue
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            added = h * w - int(mask[top : top + h, left : left + w].sum())
            if 0 < added <= remaining:
                mask[top : top + h, left : left + w] = True
                break
        else:
            break
    return mask


def batch_masks(count: int, grid: tuple[int, int], settings: MaskSettings, rng: np.random.Generator) -> np.ndarray:
    """Masks for a batch of global crops, bool `[count, patches]`.

    A share of the crops is masked; their target ratios fill the plan's range evenly (DINOv2, data/collate.py).
    """
    height, width = grid
    masked = int(count * settings.probability)
    edges = np.linspace(*settings.ratio, masked + 1)
    masks = np.zeros((count, height * width), dtype=bool)
    chosen = rng.permutation(count)[:masked]
    for i, row in enumerate(chosen):
        share = edges[i + 1] if settings.exact else rng.uniform(edges[i], edges[i + 1])
        target = int(height * width * share)
        mask = block_mask(height, width, target, rng)
        if settings.shift:
            mask = np.roll(mask, (rng.integers(height), rng.integers(width)), (0, 1))
        masks[row] = mask.reshape(-1)
        if settings.exact:
            _fill(masks[row], target, rng)
    return masks


def _fill(mask: np.ndarray, target: int, rng: np.random.Generator) -> None:
    """Mask single patches, in place, until there are `target`."""
    missing = target - int(mask.sum())
    mask[rng.choice(np.flatnonzero(~mask), missing, replace=False)] = True
