"""Attention over packed crops: the tokens of all crops in one tensor, each crop attending to itself alone.

The only module that imports xformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError
from pretrain.models.config import Backend
from pretrain.models.rope import Rotation, rotate

Shape = tuple[int, int]  # crops, tokens a crop
AttentionFunction = Callable[[Tensor, Sequence[Shape], Sequence[Rotation] | None], Tensor]


def get_attention(backend: Backend) -> AttentionFunction:
    """The attention function of a backend.

    It maps packed `qkv [tokens, 3, heads, head_dim]`, the shapes of the crop groups that follow one another in it and,
    for rotary positions, the rotation of each group, to `[tokens, heads * head_dim]`. All backends give the same
    output to rounding.

    Raises:
        UserError: the backend's package is missing.
    """
    if backend == "xformers":
        _require_xformers()
    return {"sdpa": _sdpa, "xformers": _xformers, "reference": _reference}[backend]


def _groups(
    qkv: Tensor, shapes: Sequence[Shape], rotations: Sequence[Rotation] | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value `[crops, heads, tokens, head_dim]` of each group."""
    groups = []
    for i, (part, shape) in enumerate(zip(qkv.split([c * t for c, t in shapes]), shapes, strict=True)):
        query, key, value = part.unflatten(0, shape).permute(2, 0, 3, 1, 4).unbind(0)
        if rotations is not None:
            query, key = rotate(query, rotations[i]), rotate(key, rotations[i])
        groups.append((query, key, value))
    return groups


def _packed(group: Tensor) -> Tensor:
    """`[crops, heads, tokens, head_dim]` back to `[crops * tokens, heads * head_dim]`."""
    return group.transpose(1, 2).flatten(2).flatten(0, 1)


def _sdpa(qkv: Tensor, shapes: Sequence[Shape], rotations: Sequence[Rotation] | None = None) -> Tensor:
    outputs = [_packed(F.scaled_dot_product_attention(*group)) for group in _groups(qkv, shapes, rotations)]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _reference(qkv: Tensor, shapes: Sequence[Shape], rotations: Sequence[Rotation] | None = None) -> Tensor:
    groups = _groups(qkv, shapes, rotations)
    return torch.cat([_packed(_weights(query, key) @ value) for query, key, value in groups])


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)


def attention_weights(qkv: Tensor, shape: Shape, rotations: Sequence[Rotation] | None = None) -> Tensor:
    """What each token of one group of crops attends to, `[crops, heads, tokens, tokens]`, rows summing to 1."""
    ((query, key, _),) = _groups(qkv, [shape], rotations)
    return _weights(query, key)


def _require_xformers() -> None:
    try:
        import xformers.ops  # noqa: F401
    except ImportError:
        raise UserError("attention: xformers is not installed; pip install 'fovea[gpu]' or choose sdpa") from None


def _xformers(qkv: Tensor, shapes: Sequence[Shape], rotations: Sequence[Rotation] | None = None) -> Tensor:
    from xformers.ops import fmha, memory_efficient_attention

    lengths = [tokens for crops, tokens in shapes for _ in range(crops)]
    mask = fmha.BlockDiagonalMask.from_seqlens(lengths, device=qkv.device)
    if rotations is None:
        query, key, value = qkv.unbind(1)
    else:
        groups = _groups(qkv, shapes, rotations)
        query, key = (torch.cat([_packed(group[i]) for group in groups]).view_as(qkv[:, 0]) for i in (0, 1))
        value = qkv[:, 2]
    query, key, value = (each.unsqueeze(0) for each in (query, key, value))
    return memory_efficient_attention(query, key, value, attn_bias=mask).squeeze(0).flatten(1)
