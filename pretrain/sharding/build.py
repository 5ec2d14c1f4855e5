"""Builds the backend that the settings ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pretrain.config import Optimizer, Sharding
from pretrain.distributed import device_of_rank
from pretrain.sharding.base import Backend


def build(
    module: nn.Module,
    groups: list[dict[str, Any]],
    optimizer: Optimizer,
    sharding: Sharding,
    spread: tuple[int, int],
) -> Backend:
    """Build the backend that the settings ask for, on this rank's device.

    Args:
        module: what is trained.
        groups: AdamW's groups of its parameters.
        spread: the micro-batch of a rank, and micro-batches a step.
    """
    device = device_of_rank()
    module.to(device)
    # On a CPU, where an offloaded optimizer steps, the fused kernel is the one that goes through memory once.
    kernel = {"foreach": True} if sharding.offload_optimizer == "none" else {"fused": True}
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=optimizer.betas, eps=optimizer.eps, **kernel)
    if sharding.backend == "torch":
        from pretrain.sharding.single_process import SingleProcessBackend

        return SingleProcessBackend(module, adamw, optimizer.grad_clip, spread[1], device)
    from pretrain.sharding.deepspeed_engine import DeepSpeedBackend

    return DeepSpeedBackend(module, adamw, optimizer.grad_clip, sharding, spread, device)
