"""The Vision Transformer (arXiv 2010.11929) as DINOv2 and DINOv3 build it.

Crops of any number of sizes run in one pass: linear layers see the tokens of all crops concatenated, attention each
crop alone. Parameter names are timm's where timm has the part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor, nn

from pretrain.models import positions
from pretrain.models.attention import Shape
from pretrain.models.blocks import Block, Rotations
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.execution import Execution, run_block
from pretrain.models.rope import AxialRope


@dataclass
class Features:
    """What a backbone says of B crops, after the final norm."""

    class_token: Tensor
    """`[B, dim]`"""
    patch_tokens: Tensor
    """`[B, patches, dim]`, row by row"""
    registers: Tensor | None = None
    """`[B, registers, dim]`, where there are any"""


class PatchEmbed(nn.Module):
    """Non-overlapping patches to token vectors."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images)


class VisionTransformer(nn.Module):
    """A Vision Transformer over lists of crop groups.

    Attributes:
        execution: what training spares in memory or compiles; the outputs are the same to rounding.
    """

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.config, self.image_size = config, config.image_size
        self.execution = Execution()
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.reg_token = (
            nn.Parameter(torch.empty(1, config.num_register_tokens, config.embed_dim))
            if config.num_register_tokens
            else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, config.embed_dim))
        self._place(config)
        self.norm_pre = nn.LayerNorm(config.embed_dim, eps=config.norm_eps) if config.pre_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.cls_norm = (
            nn.LayerNorm(config.embed_dim, eps=config.norm_eps) if config.untie_cls_and_patch_norms else None
        )
        self.local_cls_norm = (
            nn.LayerNorm(config.embed_dim, eps=config.norm_eps) if config.untie_global_and_local_cls_norm else None
        )
        self._init_weights()

    def _place(self, config: VisionTransformerConfig) -> None:
        self.pos_embed: nn.Parameter | None = None
        self.rope = AxialRope(config.rope, config.embed_dim // config.num_heads) if config.pos_embed == "rope" else None
        if config.pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, config.embed_dim))
        elif config.pos_embed == "sincos":
            table = positions.sincos(config.grid, config.embed_dim)
            self.pos_embed = nn.Parameter(table, requires_grad=False)

    def _init_weights(self) -> None:
        """DINOv2's initial values, truncated normal and special tokens near zero, or MAE's (arXiv 2111.06377, A.1)."""
        xavier, std = self.config.init == "xavier", self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight) if xavier else nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if xavier:
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        if self.config.pos_embed == "learned":
            assert self.pos_embed is not None
            nn.init.trunc_normal_(self.pos_embed, std=std)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=std if xavier else 1e-6)

    def __call__(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        kept: Tensor | None = None,
    ) -> list[Features]:
        """Features of each group of crops.

        Args:
            crops: groups of images `[B, 3, H, W]`; sizes may differ between groups, sides are multiples of the patch.
                With `untie_global_and_local_cls_norm`, groups after the first are local crops in training.
            masks: for each group, None or bool `[B, patches]`: patch tokens that the mask token replaces.
            kept: int64 `[B, n]`: the patches that a pass of one group sees at all (MAE), and whose tokens it returns;
                not with rotary positions.
        """
        # `forward` gives tuples, in which ZeRO's hooks find the tensors; in a dataclass they would not.
        return [Features(*tokens) for tokens in super().__call__(crops, masks, kept)]

    def forward(
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None, kept: Tensor | None
    ) -> list[tuple[Tensor, ...]]:
        """Class tokens, patch tokens and registers of each group; see `__call__`."""
        tokens = [self.tokens(images, mask) for images, mask in zip(crops, masks or [None] * len(crops), strict=True)]
        if kept is not None:
            tokens = [self._drop_masked(group, kept) for group in tokens]
        grids = [self._grid(images) for images in crops]
        packed = self._run(tokens, grids)
        return [self._features(x, local=i > 0) for i, x in enumerate(packed)]

    def _drop_masked(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """Class token, registers and some of the patches."""
        prefix = 1 + self.config.num_register_tokens
        patches = tokens[:, prefix:].gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[-1]))
        return torch.cat([tokens[:, :prefix], patches], dim=1)

    def _run(self, tokens: Sequence[Tensor], grids: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Groups `[B, tokens, dim]` through all blocks, before the final norm."""
        shapes: list[Shape] = [(group.shape[0], group.shape[1]) for group in tokens]
        x = deque(self._run_blocks(torch.cat([group.flatten(0, 1) for group in tokens]), shapes, grids), maxlen=1).pop()
        parts = x.split([crops * length for crops, length in shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, shapes, strict=True)]

    def _run_blocks(self, x: Tensor, shapes: Sequence[Shape], grids: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
        """Packed tokens after each block."""
        rotations = self._rotations(grids)
        for i, block in enumerate(self.blocks):
            if i and self.rope is not None and self.rope.varies:  # DINOv3 augments positions anew for each block
                rotations = self._rotations(grids)
            x = run_block(block, x, shapes, rotations, self.execution)
            yield x

    def get_intermediate_layers(self, images: Tensor, blocks: int, norm: bool = True) -> list[Features]:
        """Features of images `[B, 3, H, W]` after each of the last blocks, in order, through the final norm or not."""
        tokens, grid = self.tokens(images), self._grid(images)
        shape = (tokens.shape[0], tokens.shape[1])
        found = deque(self._run_blocks(tokens.flatten(0, 1), [shape], [grid]), maxlen=blocks)
        outputs = [x.unflatten(0, shape) for x in found]
        if norm:
            return [Features(*self._features(x, local=False)) for x in outputs]
        return [Features(x[:, 0], x[:, 1 + self.config.num_register_tokens :]) for x in outputs]

    @property
    def embed_dim(self) -> int:
        """Width of the class token."""
        return self.config.embed_dim

    @property
    def patch_dim(self) -> int:
        """Width of the patch tokens."""
        return self.config.embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.config.patch_size

    def get_last_self_attention(self, images: Tensor) -> Tensor:
        """How the class token of each image `[B, 3, H, W]` attends to its patches in the last block, by head.

        Returns:
            `[B, heads, H / patch, W / patch]`; what falls on registers and the class token itself is left out.
        """
        tokens, grid = self.tokens(images), self._grid(images)
        shape, x, last = (tokens.shape[0], tokens.shape[1]), tokens.flatten(0, 1), self.blocks[-1]
        assert isinstance(last, Block)
        before = islice(self._run_blocks(x, [shape], [grid]), len(self.blocks) - 1)
        x = deque(chain([x], before), maxlen=1).pop()
        weights = last.attn.weights(x, last.norm1, shape, self._rotations([grid]))
        return weights[:, :, 0, 1 + self.config.num_register_tokens :].unflatten(-1, grid)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size

    def _rotations(self, grids: Sequence[tuple[int, ...]]) -> Rotations:
        if self.rope is None:
            return None
        return [self.rope(height, width, 1 + self.config.num_register_tokens) for height, width in grids]

    def _features(self, x: Tensor, local: bool) -> tuple[Tensor, ...]:
        prefix = 1 + self.config.num_register_tokens
        norm = self.norm
        if local and self.training and self.local_cls_norm is not None:
            norm = self.local_cls_norm
        elif self.cls_norm is not None:
            norm = self.cls_norm
        if norm is self.norm:
            x = norm(x)
            first, patches = x[:, :prefix], x[:, prefix:]
        else:
            first, patches = norm(x[:, :prefix]), self.norm(x[:, prefix:])
        return (first[:, 0], patches, first[:, 1:]) if prefix > 1 else (first[:, 0], patches)

    def tokens(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images `[B, 3, H, W]` to the tokens `[B, 1 + registers + patches, dim]` that enter the first block."""
        grid = self.patch_embed(images)
        patches = grid.flatten(2).transpose(1, 2)
        if mask is not None:
            patches = torch.where(mask.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        class_token: Tensor = self.cls_token
        if self.pos_embed is not None:
            class_token = class_token + self.pos_embed[:, :1]
            side, shape = self.config.grid, (grid.shape[2], grid.shape[3])
            patches = patches + positions.resample_pos_embed(
                self.pos_embed[:, 1:], (side, side), shape, self.config.interpolation
            )
        batch = images.shape[0]
        parts = [class_token.expand(batch, -1, -1)]
        if self.reg_token is not None:
            parts.append(self.reg_token.expand(batch, -1, -1))
        tokens = torch.cat([*parts, patches], dim=1)
        return tokens if self.norm_pre is None else self.norm_pre(tokens)
