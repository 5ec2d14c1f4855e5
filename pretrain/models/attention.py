"""Attention over packed crops: the tokens of all crops in one tensor, each crop attending to itself alone.

The only module that imports xformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError
from pretrain.config import Backend

Shape = tuple[int, int]  # crops, tokens a crop
Attention = Callable[[Tensor, Sequence[Shape]], Tensor]


def attention(backend: Backend) -> Attention:
    """The attention function of a backend.

    It maps packed `qkv [tokens, 3, heads, head_dim]` and the shapes of the crop groups that follow one another in it
    to `[tokens, heads * head_dim]`. All backends give the same output to rounding.

    Raises:
        UserError: the backend's package is missing.
    """
    if backend == "xformers":
        _require_xformers()
    return {"sdpa": _sdpa, "xformers": _xformers, "reference": _reference}[backend]


def _groups(qkv: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Split packed tokens into `[3, crops, heads, tokens, head_dim]` for each group."""
    parts = qkv.split([crops * tokens for crops, tokens in shapes])
    return [part.unflatten(0, shape).permute(2, 0, 3, 1, 4) for part, shape in zip(parts, shapes, strict=True)]


def _packed(group: Tensor) -> Tensor:
    """`[crops, heads, tokens, head_dim]` back to `[crops * tokens, heads * head_dim]`."""
    return group.transpose(1, 2).flatten(2).flatten(0, 1)


def _sdpa(qkv: Tensor, shapes: Sequence[Shape]) -> Tensor:
    return torch.cat([_packed(F.scaled_dot_product_attention(*group)) for group in _groups(qkv, shapes)])


def _reference(qkv: Tensor, shapes: Sequence[Shape]) -> Tensor:
    outputs = []
    for query, key, value in _groups(qkv, shapes):
        weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
        outputs.append(_packed(weights @ value))
    return torch.cat(outputs)


def _require_xformers() -> None:
    try:
        import xformers.ops  # noqa: F401
    except ImportError:
        raise UserError("attention: xformers is not installed; pip install 'fovea[gpu]' or choose sdpa") from None


def _xformers(qkv: Tensor, shapes: Sequence[Shape]) -> Tensor:
    from xformers.ops import fmha, memory_efficient_attention

    lengths = [tokens for crops, tokens in shapes for _ in range(crops)]
    mask = fmha.BlockDiagonalMask.from_seqlens(lengths, device=qkv.device)
    query, key, value = qkv.unsqueeze(0).unbind(2)
    return memory_efficient_attention(query, key, value, attn_bias=mask).squeeze(0).flatten(1)
