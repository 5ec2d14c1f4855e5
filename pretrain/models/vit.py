"""The Vision Transformer (arXiv 2010.11929) as DINOv2 builds it: LayerScale, registers, stochastic depth by subset.

Crops of any number of sizes run in one pass: linear layers see the tokens of all crops concatenated, attention each
crop alone. Parameter names are timm's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import VisionTransformerConfig
from pretrain.models.attention import Attention, Shape, attention


@dataclass
class Features:
    """What a backbone says of B crops, after the final norm."""

    class_token: Tensor
    """`[B, dim]`"""
    patch_tokens: Tensor
    """`[B, patches, dim]`, row by row"""


class Attend(nn.Module):
    """Multi-head self-attention over packed crops."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)
        self.attention: Attention = attention(config.attention)

    def forward(self, x: Tensor, shapes: Sequence[Shape]) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3, self.heads, -1))
        return self.proj(self.attention(qkv, shapes))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.dim, hidden)
        self.fc2 = nn.Linear(hidden, config.dim)

    def forward(self, x: Tensor, shapes: Sequence[Shape]) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention and MLP branches around a residual stream of packed tokens `[tokens, dim]`."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.drop_path = config.drop_path
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attend(config)
        self.ls1 = LayerScale(config.dim, config.layer_scale)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = Mlp(config)
        self.ls2 = LayerScale(config.dim, config.layer_scale)

    def forward(self, x: Tensor, shapes: Sequence[Shape]) -> Tensor:
        x = self._branch(x, shapes, self.norm1, self.attn, self.ls1)
        return self._branch(x, shapes, self.norm2, self.mlp, self.ls2)

    def _branch(self, x: Tensor, shapes: Sequence[Shape], norm: nn.Module, body: nn.Module, scale: nn.Module) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x + scale(body(norm(x), shapes))
        rows, kept, factors = _subset(shapes, self.drop_path, x.device)
        branch = scale(body(norm(x[rows]), kept))
        return x.index_add(0, rows, (branch * factors).to(x.dtype))


def _subset(shapes: Sequence[Shape], drop: float, device: torch.device) -> tuple[Tensor, list[Shape], Tensor]:
    """Crops that keep a branch: their token rows, the shapes of what is left and the factor that keeps the mean."""
    rows, kept, factors, first = [], [], [], 0
    for crops, tokens in shapes:
        keep = max(int(crops * (1 - drop)), 1)
        chosen = torch.randperm(crops, device=device)[:keep]
        rows.append((first + chosen[:, None] * tokens + torch.arange(tokens, device=device)).flatten())
        factors.append(torch.full((keep * tokens, 1), crops / keep, device=device))
        kept.append((keep, tokens))
        first += crops * tokens
    return torch.cat(rows), kept, torch.cat(factors)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to token vectors."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.dim, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class VisionTransformer(nn.Module):
    """A Vision Transformer over lists of crop groups."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.reg_token = nn.Parameter(torch.empty(1, config.registers, config.dim)) if config.registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self._initialise()

    def _initialise(self) -> None:
        """DINOv2's initial values: truncated normal, special tokens near zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.config.init_std)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=self.config.init_std)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> list[Features]:
        """Features of each group of crops.

        Args:
            crops: groups of images `[B, 3, H, W]`; sizes may differ between groups, sides are multiples of the patch.
            masks: for each group, None or bool `[B, patches]`: patch tokens that the mask token replaces.
        """
        tokens = [self._tokens(images, mask) for images, mask in zip(crops, masks or [None] * len(crops), strict=True)]
        shapes = [(group.shape[0], group.shape[1]) for group in tokens]
        x = torch.cat([group.flatten(0, 1) for group in tokens])
        for block in self.blocks:
            x = block(x, shapes)
        return [
            self._features(part, shape) for part, shape in zip(self._split(self.norm(x), shapes), shapes, strict=True)
        ]

    def _split(self, x: Tensor, shapes: Sequence[Shape]) -> tuple[Tensor, ...]:
        return x.split([crops * tokens for crops, tokens in shapes])

    def _features(self, x: Tensor, shape: Shape) -> Features:
        x = x.unflatten(0, shape)
        return Features(class_token=x[:, 0], patch_tokens=x[:, 1 + self.config.registers :])

    def _tokens(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Images `[B, 3, H, W]` to tokens `[B, 1 + registers + patches, dim]`."""
        grid = self.patch_embed(images)
        patches = grid.flatten(2).transpose(1, 2)
        if mask is not None:
            patches = torch.where(mask.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        class_position, patch_positions = self._positions(grid.shape[2], grid.shape[3])
        batch = images.shape[0]
        parts = [(self.cls_token + class_position).expand(batch, -1, -1)]
        if self.reg_token is not None:
            parts.append(self.reg_token.expand(batch, -1, -1))
        return torch.cat([*parts, patches + patch_positions], dim=1)

    def _positions(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Position embedding of the class token `[1, 1, dim]` and of a grid of patches `[1, height*width, dim]`."""
        class_position, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        side = self.config.grid
        if (height, width) != (side, side):
            square = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
            square = F.interpolate(square, size=(height, width), mode="bicubic", antialias=True)
            patches = square.permute(0, 2, 3, 1).flatten(1, 2)
        return class_position, patches
