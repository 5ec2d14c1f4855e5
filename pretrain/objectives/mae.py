"""MAE (arXiv 2111.06377): a small decoder tells the pixels of hidden patches from the visible ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.data.loader import Batch
from pretrain.models import positions
from pretrain.models.blocks import Block
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.base import Objective, Outputs
from pretrain.objectives.config import MaeConfig


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images `[B, 3, H, W]` to pixels of patches `[B, patches, patch * patch * 3]`: row, column, then channel."""
    rows = images.unfold(2, patch, patch).unfold(3, patch, patch)
    return rows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def normalized(pixels: Tensor) -> Tensor:
    """Each patch with mean 0 and variance 1 (section 4.1, normalized pixels)."""
    return (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()


class Decoder(nn.Module):
    """Visible tokens and a mask token in every hidden place to pixels."""

    def __init__(self, config: MaeConfig, encoder: VisionTransformerConfig) -> None:
        super().__init__()
        shape = VisionTransformerConfig(
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            patch_size=encoder.patch_size,
            image_size=encoder.image_size,
            layer_scale_init=None,
            norm_eps=encoder.norm_eps,
        )
        self.embed = nn.Linear(encoder.embed_dim, config.embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(positions.sincos(shape.grid, config.embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=shape.norm_eps)
        self.pixels = nn.Linear(config.embed_dim, 3 * encoder.patch_size**2)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, visible: Tensor, restore: Tensor) -> Tensor:
        """Tokens `[B, 1 + n, dim]` and the place of each patch in the shuffled order, `[B, patches]`, to pixels."""
        tokens = self.embed(visible)
        hidden = self.mask_token.expand(len(tokens), restore.shape[1] + 1 - tokens.shape[1], -1)
        patches = torch.cat([tokens[:, 1:], hidden.to(tokens.dtype)], dim=1)
        patches = patches.gather(1, restore[:, :, None].expand(-1, -1, patches.shape[-1]))
        x = torch.cat([tokens[:, :1], patches], dim=1) + self.pos_embed
        shape = (x.shape[0], x.shape[1])
        x = x.flatten(0, 1)
        for block in self.blocks:
            x = block(x, [shape])
        return self.pixels(self.norm(x).unflatten(0, shape)[:, 1:])


class Mae(Objective):
    """Mean squared error of the pixels of hidden patches, of the first global crop."""

    def __init__(self, config: MaeConfig, student: VisionTransformerConfig, teacher: VisionTransformerConfig) -> None:
        super().__init__(config.weight)
        self.config = config
        self.patch_size = student.patch_size
        self.decoder = Decoder(config, student)

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`mae`"""
        images = outputs.images[: len(batch.positions)]
        patches = (images.shape[-2] // self.patch_size) * (images.shape[-1] // self.patch_size)
        noise = torch.rand(len(images), patches, device=images.device)
        return {"mae": self.loss(outputs, images, noise)[0]}

    def loss(self, outputs: Outputs, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the predicted pixels `[B, patches, pixels]`; patches with the least `noise` are visible."""
        order = noise.argsort(1)
        visible = int(noise.shape[1] * (1 - self.config.mask_ratio))
        assert isinstance(outputs.student, VisionTransformer)
        seen = outputs.student([images], kept=order[:, :visible])[0]
        restore = order.argsort(1)
        predicted = self.decoder(torch.cat([seen.class_token[:, None], seen.patch_tokens], dim=1), restore)
        target = patchify(images, self.patch_size)
        if self.config.normalize_pixels:
            target = normalized(target)
        error = (predicted.float() - target.float()).square().mean(-1)
        hidden = (restore >= visible).to(error.dtype)
        return (error * hidden).sum() / hidden.sum(), predicted
