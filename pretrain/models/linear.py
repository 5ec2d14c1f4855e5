"""A linear layer that keeps for the backward pass only what cannot be had again cheaply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def scaled_linear(x: Tensor, layer: nn.Linear, scale: Tensor | None, activation: Activation | None = None) -> Tensor:
    """`scale * layer(activation(x))` for tokens `[n, width]`.

    The plain composition keeps the activation's output, and the layer's for the gradient of LayerScale's `scale`; here
    the first is computed again and the second follows from the weight's gradient, so that only `x` is kept.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # a compiler decides by itself what to keep
        weight, bias = _folded(layer.weight, layer.bias, scale, x.dtype)
        return F.linear(x if activation is None else activation(x), weight, bias)
    return _ScaledLinear.apply(x, layer.weight, layer.bias, scale, activation)


def _folded(weight: Tensor, bias: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if scale is not None:
        weight, bias = weight * scale[:, None], bias * scale
    return weight.to(dtype), bias.to(dtype)


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, activation: Activation | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        ctx.activation = activation
        return F.linear(x if activation is None else activation(x), *_folded(weight, bias, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale = ctx.saved_tensors
        (gradient,) = gradients
        folded, _ = _folded(weight, bias, scale, x.dtype)
        given = gradient @ folded
        activated = x
        if ctx.activation is not None:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                activated = ctx.activation(x)
            (given,) = torch.autograd.grad(activated, x, given)
        by_weight = (gradient.T @ activated.detach()).to(weight.dtype)
        by_bias = gradient.sum(0, dtype=bias.dtype)
        if scale is None:
            return given, by_weight, by_bias, None, None
        by_scale = (weight * by_weight).sum(1) + bias * by_bias
        return given, by_weight * scale[:, None], by_bias * scale, by_scale, None
