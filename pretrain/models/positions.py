"""Position tables: learned ones resized to any grid, as patch tokens can be, and fixed sines and cosines."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.config import Interpolation

Grid = tuple[int, int]  # rows and columns of patches

_OFFSET = 0.1  # patches; DINOv2's guard against rounding when it resizes by a factor


def resample_pos_embed(tokens: Tensor, grid: Grid, wanted: Grid, how: Interpolation) -> Tensor:
    """Resize patch tokens or positions `[n, rows * columns, dim]` of one grid to another, bicubically."""
    if grid == wanted:
        return tokens
    maps = tokens.unflatten(1, grid).permute(0, 3, 1, 2).float()
    if how == "offset":
        factors = [(new + _OFFSET) / old for new, old in zip(wanted, grid, strict=True)]
        maps = F.interpolate(maps, scale_factor=factors, mode="bicubic")
    else:
        maps = F.interpolate(maps, size=wanted, mode="bicubic", antialias=how == "antialias")
    return maps.permute(0, 2, 3, 1).flatten(1, 2).to(tokens.dtype)


def to_grid(tokens: Tensor, patches: int) -> Tensor:
    """Patch tokens `[n, side * side, dim]` of square images on another square grid of so many patches, bilinearly."""
    if tokens.shape[1] == patches:
        return tokens
    own, side = math.isqrt(tokens.shape[1]), math.isqrt(patches)
    maps = tokens.unflatten(1, (own, own)).permute(0, 3, 1, 2).float()
    maps = F.interpolate(maps, size=(side, side), mode="bilinear", antialias=side < own)
    return maps.permute(0, 2, 3, 1).flatten(1, 2).to(tokens.dtype)


def sincos(side: int, dim: int) -> Tensor:
    """MAE's fixed table `[1, 1 + side * side, dim]`, the class token's row zero (arXiv 2111.06377, section 4).

    The first half of the width holds sines and cosines of the column, the second of the row.
    """
    rates = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, 0)
    patches = torch.cat([columns, rows], dim=1).float()
    return torch.cat([patches.new_zeros(1, dim), patches]).unsqueeze(0)
