"""How blocks are run in training: what is kept for the backward pass, and whether they are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from pretrain.models.attention import Shape
from pretrain.models.config import Checkpointing
from pretrain.models.rope import Rotation


@dataclass(frozen=True)
class Execution:
    """Speed and memory only."""

    checkpointing: Checkpointing = "none"
    """Keep everything; matrix products and attention only; or the input of each block only."""
    compile: bool = False
    """Compile each block with torch.compile."""


def run_block(
    block: nn.Module, x: Tensor, shapes: Sequence[Shape], rotations: Sequence[Rotation] | None, execution: Execution
) -> Tensor:
    """One block, as `execution` says."""
    run = _compiled(block) if execution.compile else block
    if execution.checkpointing == "none" or not torch.is_grad_enabled():
        return run(x, shapes, rotations)
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)}
    options: dict[str, Any] = contexts if execution.checkpointing == "selective" else {}
    return checkpoint(run, x, shapes, rotations, use_reentrant=False, **options)


def _compiled(block: nn.Module) -> Any:
    """The compiled block, made once and kept beside it, outside its parameters."""
    if "_run_compiled" not in block.__dict__:
        block.__dict__["_run_compiled"] = torch.compile(block.forward, dynamic=True)
    return block.__dict__["_run_compiled"]


_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
