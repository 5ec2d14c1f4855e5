"""Position tables: learned ones resized to any grid, and fixed sines and cosines."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_OFFSET = 0.1  # patches; DINOv2's guard against rounding when it resizes by a factor


def resized(table: Tensor, side: int, height: int, width: int, how: Literal["antialias", "offset", "plain"]) -> Tensor:
    """Resize patch positions `[1, side * side, dim]` to `[1, height * width, dim]`, bicubically."""
    if (height, width) == (side, side):
        return table
    square = table.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
    if how == "offset":
        factors = ((height + _OFFSET) / side, (width + _OFFSET) / side)
        square = F.interpolate(square, scale_factor=factors, mode="bicubic")
    else:
        square = F.interpolate(square, size=(height, width), mode="bicubic", antialias=how == "antialias")
    return square.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)


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
