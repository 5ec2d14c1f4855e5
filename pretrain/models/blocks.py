"""Transformer blocks over packed crops: attention and feed-forward branches around a residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.attention import AttentionFunction, Shape, attention_weights, get_attention
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.linear import normed_linear, scaled_linear
from pretrain.models.rope import Rotation

Rotations = Sequence[Rotation] | None


class Attention(nn.Module):
    """Multi-head self-attention on normed tokens."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.keyless = config.qkv_bias and not config.key_bias
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)
        self.attention: AttentionFunction = get_attention(config.attention)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, shapes: Sequence[Shape], rotations: Rotations, scale: Tensor | None
    ) -> Tensor:
        qkv = normed_linear(x, norm, self.qkv, self._bias()).unflatten(1, (3, self.heads, -1))
        return scaled_linear(self.attention(qkv, shapes, rotations), self.proj, scale)

    def weights(self, x: Tensor, norm: nn.LayerNorm, shape: Shape, rotations: Rotations) -> Tensor:
        """Attention of every token to every other, `[crops, heads, tokens, tokens]`, of one group of crops."""
        qkv = normed_linear(x, norm, self.qkv, self._bias()).unflatten(1, (3, self.heads, -1))
        return attention_weights(qkv, shape, rotations)

    def _bias(self) -> Tensor | None:
        if not self.keyless:
            return self.qkv.bias
        query, key, value = self.qkv.bias.chunk(3)
        return torch.cat([query, torch.zeros_like(key), value])


class FeedForward(nn.Module):
    """Two linear layers on normed tokens, between them a GELU or SwiGLU's gate times value (arXiv 2002.05202)."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        gated = config.ffn_layer == "swiglu"
        plain = F.gelu if config.activation == "gelu" else _quick_gelu
        self.activation: Callable[[Tensor], Tensor] = _swiglu if gated else plain
        self.fc1 = nn.Linear(config.embed_dim, config.hidden * (2 if gated else 1))
        self.fc2 = nn.Linear(config.hidden, config.embed_dim)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, shapes: Sequence[Shape], rotations: Rotations, scale: Tensor | None
    ) -> Tensor:
        return scaled_linear(normed_linear(x, norm, self.fc1, self.fc1.bias), self.fc2, scale, self.activation)


def _quick_gelu(hidden: Tensor) -> Tensor:
    return hidden * torch.sigmoid(1.702 * hidden)


def _swiglu(hidden: Tensor) -> Tensor:
    gate, value = hidden.chunk(2, dim=-1)
    return F.silu(gate) * value


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))


class Block(nn.Module):
    """Attention, then feed-forward, each before its own norm, on tokens `[tokens, dim]`."""

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.drop_path = config.drop_path_rate
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = FeedForward(config)
        if config.layer_scale_init is not None:
            self.ls1 = LayerScale(config.embed_dim, config.layer_scale_init)
            self.ls2 = LayerScale(config.embed_dim, config.layer_scale_init)

    def forward(self, x: Tensor, shapes: Sequence[Shape], rotations: Rotations = None) -> Tensor:
        scale1, scale2 = (self.ls1.gamma, self.ls2.gamma) if hasattr(self, "ls1") else (None, None)
        x = self._branch(x, shapes, rotations, self.norm1, self.attn, scale1)
        return self._branch(x, shapes, rotations, self.norm2, self.mlp, scale2)

    def _branch(
        self,
        x: Tensor,
        shapes: Sequence[Shape],
        rotations: Rotations,
        norm: nn.LayerNorm,
        body: Attention | FeedForward,
        scale: Tensor | None,
    ) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x + body(x, norm, shapes, rotations, scale)
        rows, kept, factors = _sample_subset(shapes, self.drop_path, x.device)
        branch = body(x[rows], norm, kept, rotations, scale)
        return x.index_add(0, rows, (branch * factors).to(x.dtype))


def _sample_subset(shapes: Sequence[Shape], drop: float, device: torch.device) -> tuple[Tensor, list[Shape], Tensor]:
    """Crops that keep a branch: their token rows, the shapes of what is left and the factor that keeps the mean.

    Stochastic depth by leaving crops out of the computation (DINOv2, arXiv 2304.07193, section 5).
    """
    rows, kept, factors, first = [], [], [], 0
    for crops, tokens in shapes:
        keep = max(int(crops * (1 - drop)), 1)
        chosen = torch.randperm(crops, device=device)[:keep]
        rows.append((first + chosen[:, None] * tokens + torch.arange(tokens, device=device)).flatten())
        factors.append(torch.full((keep * tokens, 1), crops / keep, device=device))
        kept.append((keep, tokens))
        first += crops * tokens
    return torch.cat(rows), kept, torch.cat(factors)
