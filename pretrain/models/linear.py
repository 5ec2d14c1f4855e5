"""Linear layers that keep for the backward pass only what cannot be had again cheaply."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Before = Callable[..., Tensor]  # (x, *parameters) -> input of the linear layer


def normed_linear(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear, bias: Tensor | None) -> Tensor:
    """`layer(norm(x))` with another bias, for tokens `[n, width]`; keeps `x` alone."""
    before = partial(_layer_norm, eps=norm.eps)
    return _recompute_linear(x, layer.weight, bias, None, before, norm.weight, norm.bias)


def scaled_linear(x: Tensor, layer: nn.Linear, scale: Tensor | None, before: Before | None = None) -> Tensor:
    """`scale * layer(before(x))` for tokens `[n, width]`; keeps `x` alone.

    The plain composition keeps the output of `before`, and the layer's for the gradient of LayerScale's `scale`. Here
    the first is computed again, and the second follows from the weight's gradient.
    """
    return _recompute_linear(x, layer.weight, layer.bias, scale, before or _unchanged)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _recompute_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, before: Before, *parameters: Tensor
) -> Tensor:
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler decides by itself what to keep
        return F.linear(before(x, *parameters).to(dtype), *_fold_scale(weight, bias, scale, dtype))
    return RecomputeLinear.apply(x, weight, bias, scale, before, dtype, *parameters)


def _fold_scale(
    weight: Tensor, bias: Tensor | None, scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    if scale is not None:
        weight, bias = weight * scale[:, None], None if bias is None else bias * scale
    return weight.to(dtype), None if bias is None else bias.to(dtype)


class RecomputeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        before: Before,
        dtype: torch.dtype,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale, *parameters)
        ctx.before, ctx.dtype = before, dtype
        return F.linear(before(x, *parameters).to(dtype), *_fold_scale(weight, bias, scale, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, *parameters = ctx.saved_tensors
        (gradient,) = gradients
        folded, _ = _fold_scale(weight, bias, scale, ctx.dtype)
        leaves = [value.detach().requires_grad_() for value in (x, *parameters)]
        with torch.enable_grad():
            given = ctx.before(*leaves).to(ctx.dtype)
        by_input = torch.autograd.grad(given, leaves, gradient @ folded)
        by_weight = (gradient.T @ given.detach()).to(weight.dtype)
        by_bias = None if bias is None else gradient.sum(0, dtype=bias.dtype)
        by_scale = None
        if scale is not None:
            by_scale = (weight * by_weight).sum(1)
            by_weight = by_weight * scale[:, None]
            if bias is not None and by_bias is not None:
                by_scale, by_bias = by_scale + bias * by_bias, by_bias * scale
        return by_input[0], by_weight, by_bias, by_scale, None, None, *by_input[1:]
