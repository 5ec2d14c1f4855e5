"""Projection heads."""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pretrain.models.config import HeadConfig


class DINOHead(nn.Module):
    """MLP, L2 normalization, then weight-normalized prototypes (arXiv 2104.14294, section 3.1)."""

    def __init__(self, dim: int, config: HeadConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=config.init_std)
                nn.init.zeros_(layer.bias)
        prototypes = nn.Linear(config.bottleneck_dim, config.num_prototypes, bias=False)
        if config.weight_norm:
            prototypes = weight_norm(prototypes)
            nn.init.ones_(prototypes.parametrizations.weight.original0)
        else:
            nn.init.trunc_normal_(prototypes.weight, std=config.init_std)
        self.last_layer = prototypes

    def forward(self, x: Tensor) -> Tensor:
        """`[n, dim]` to logits `[n, prototypes]`, each in -1 to 1 at initialization."""
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, eps=1e-6))


def teacher_copy(head: DINOHead, config: HeadConfig, dim: int, teacher_dim: int) -> DINOHead:
    """The teacher's head: the student's again, or a new one where the teacher is of another width."""
    copied = copy.deepcopy(head) if teacher_dim == dim else DINOHead(teacher_dim, config)
    return copied.requires_grad_(False)
