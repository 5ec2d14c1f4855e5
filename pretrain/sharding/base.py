"""How a training step is spread over ranks: what the loop asks of an engine, and which engine the settings ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Moment = Literal["exp_avg", "exp_avg_sq"]
CLIP_GROUP = "clipped_with"
"""Key of a parameter group: groups that share its value have their gradients clipped by their common norm."""
BUCKET = 50_000_000
"""Elements of a buffer in which ZeRO collects gradients, or parameters that it fetches ahead."""
LIVE = 300_000_000
"""Elements of parameters that stage 3 holds whole at a time, at most."""
MOMENTS: tuple[Moment, ...] = ("exp_avg", "exp_avg_sq")
Pairs = Iterable[tuple[nn.Module, nn.Module]]


@dataclass(frozen=True)
class StepResult:
    """What came of an optimizer step."""

    applied: bool
    """Whether the parameters moved; they do not where the gradient is no finite number on some rank."""
    gradient_norm: float
    """Of the whole gradient, before clipping."""


@runtime_checkable
class Backend(Protocol):
    """Forward, backward and step of a module, whole or sharded, and its state tensor by tensor.

    Every method is called on all ranks together.
    """

    module: nn.Module
    device: torch.device

    def forward(self, *args: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch; the loss is divided by the number of micro-batches here."""

    def step(self) -> StepResult | None:
        """Call after every micro-batch; the optimizer moves after the last one of a step. None before."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""

    def ema_update(self, pairs: Pairs, momentum: float) -> None:
        """Move modules towards others: average = momentum * average + (1 - momentum) * source, in float32."""

    def full_param(self, parameter: nn.Parameter) -> Tensor:
        """A parameter, whole and in float32."""

    def moment(self, parameter: nn.Parameter, which: Moment) -> Tensor | None:
        """One of the optimizer's moments of a parameter, whole; None where it has had no gradient yet."""

    def set_param(self, parameter: nn.Parameter, value: Tensor, moment: Moment | None = None) -> None:
        """Set what `full_param` or `moment` gives."""

    @property
    def optimizer_steps(self) -> int:
        """Steps the optimizer has made."""

    def expect_moments(self, parameters: Sequence[nn.Parameter], optimizer_steps: int) -> None:
        """Make room for the moments of some parameters, as they are after so many steps."""


def ema_tensors(pairs: Pairs) -> tuple[list[Tensor], list[Tensor]]:
    """Sources and averages, of pairs of modules: parameters, and buffers of numbers (batch statistics)."""
    sources: list[Tensor] = []
    averages: list[Tensor] = []
    for source, average in pairs:
        for own, copy in zip(_float_tensors(source), _float_tensors(average), strict=True):
            sources.append(own)
            averages.append(copy)
    return sources, averages


def _float_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *(each for each in module.buffers() if each.is_floating_point())]


def ema_lerp(sources: list[Tensor], averages: list[Tensor], momentum: float) -> None:
    """Move tensors towards others, in place."""
    if sources:
        torch._foreach_lerp_(averages, sources, 1 - momentum)


def clip_gradients(
    gradients: dict[str, list[Tensor]], largest: float | None, total: Callable[[Tensor], Tensor]
) -> StepResult:
    """Bring the norm of each part's gradients down to `largest`; norms that are no finite numbers change nothing.

    Args:
        gradients: what this rank has of them, by part.
        largest: the largest norm; None: any.
        total: adds up over the ranks that have other pieces, float32 `[parts]`.
    """
    norms = {part: list(torch._foreach_norm(pieces)) for part, pieces in gradients.items()}
    stepped, factors = clip_factors(norms, largest, total)
    if stepped.applied and largest is not None:
        for pieces, factor in zip(gradients.values(), factors, strict=True):
            torch._foreach_mul_(pieces, factor)
    return stepped


def clip_factors(
    norms: dict[str, list[Tensor]], largest: float | None, total: Callable[[Tensor], Tensor]
) -> tuple[StepResult, Tensor]:
    """What `clip_gradients` returns, given the norms of its pieces, and what it multiplies each part by, `[parts]`."""
    squares = total(torch.stack([torch.linalg.vector_norm(torch.stack(each)) for each in norms.values()]).square())
    whole = float(squares.sum().sqrt())
    factors = torch.ones_like(squares) if largest is None else (largest / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    return StepResult(math.isfinite(whole), whole), factors


def adamw_state(like: Tensor, steps: int) -> dict[str, Tensor]:
    """The state that AdamW keeps of a tensor, with moments of zero."""
    return {"step": torch.tensor(float(steps)), **{moment: torch.zeros_like(like) for moment in MOMENTS}}
