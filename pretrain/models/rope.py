"""Axial rotary position embedding (DINOv3, arXiv 2508.10104, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pretrain.models.config import RopeConfig

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each [tokens, head_dim]


class AxialRope(nn.Module):
    """Angles of patch positions: half of each head turns with the row, half with the column."""

    periods: Tensor

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.config = config
        quarter = torch.arange(head_dim // 4, dtype=torch.float32)
        self.register_buffer("periods", config.base ** (2 * quarter / (head_dim // 2)), persistent=False)

    @property
    def varies(self) -> bool:
        """Whether each call gives another rotation of the same grid."""
        config = self.config
        return self.training and (config.shift > 0 or config.jitter > 1 or config.rescale > 1)

    def forward(self, height: int, width: int, prefix: int) -> Rotation:
        """The rotation of `prefix` tokens that stay as they are, then of a grid of patches, row by row.

        In training every call draws the coordinates' augmentation anew.
        """
        coordinates = self._augmented(self._coordinates(height, width))
        angles = 2 * math.pi * coordinates[:, :, None] / self.periods
        angles = angles.flatten(1).tile(2)
        still = angles.new_zeros(prefix, angles.shape[1])
        angles = torch.cat([still, angles])
        return angles.cos(), angles.sin()

    def _coordinates(self, height: int, width: int) -> Tensor:
        """Centers of patches in -1 to 1, `[height * width, 2]`."""
        axes = [(torch.arange(n, device=self.periods.device) + 0.5) / n * 2 - 1 for n in (height, width)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)

    def _augmented(self, coordinates: Tensor) -> Tensor:
        if not self.varies:
            return coordinates
        config = self.config
        if config.shift:
            coordinates = coordinates + coordinates.new_empty(2).uniform_(-config.shift, config.shift)
        for largest, axes in ((config.jitter, 2), (config.rescale, 1)):
            if largest > 1:
                bound = math.log(largest)
                coordinates = coordinates * coordinates.new_empty(axes).uniform_(-bound, bound).exp()
        return coordinates


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn queries or keys `[..., tokens, head_dim]`; the first half of the width pairs with the second."""
    cosines, sines = (table.to(x.dtype) for table in rotation)
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines
