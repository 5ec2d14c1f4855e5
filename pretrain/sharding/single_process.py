"""One process, no sharding: what every sharded run is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import UserError
from pretrain.distributed import rank_and_world_size
from pretrain.sharding.base import (
    CLIP_GROUP,
    Moment,
    Pairs,
    StepResult,
    adamw_state,
    clip_gradients,
    ema_lerp,
    ema_tensors,
)


class SingleProcessBackend:
    """Plain torch."""

    def __init__(
        self,
        module: nn.Module,
        adamw: torch.optim.Optimizer,
        largest_norm: float | None = None,
        accumulation: int = 1,
        device: torch.device | None = None,
    ) -> None:
        if rank_and_world_size()[1] > 1:
            raise UserError("sharding.backend: torch runs in one process; choose deepspeed for several ranks")
        self.module, self.optimizer, self.device = module, adamw, device or torch.device("cpu")
        self.largest_norm, self.accumulation = largest_norm, accumulation
        self._micro_steps = 0

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> StepResult | None:
        self._micro_steps += 1
        if self._micro_steps % self.accumulation:
            return None
        stepped = clip_gradients(gradients(self.optimizer.param_groups), self.largest_norm, lambda squares: squares)
        if stepped.applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return stepped

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @torch.no_grad()
    def ema_update(self, pairs: Pairs, momentum: float) -> None:
        sources, averages = ema_tensors(pairs)
        ema_lerp([each.data for each in sources], [each.data for each in averages], momentum)

    def full_param(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach()

    def moment(self, parameter: nn.Parameter, which: Moment) -> Tensor | None:
        return self.optimizer.state[parameter].get(which) if parameter in self.optimizer.state else None

    @torch.no_grad()
    def set_param(self, parameter: nn.Parameter, value: Tensor, moment: Moment | None = None) -> None:
        (parameter if moment is None else self.optimizer.state[parameter][moment]).copy_(value)

    @property
    def optimizer_steps(self) -> int:
        return optimizer_steps(self.optimizer)

    def expect_moments(self, parameters: Sequence[nn.Parameter], optimizer_steps: int) -> None:
        self.optimizer.state.clear()
        for parameter in parameters:
            self.optimizer.state[parameter] = adamw_state(parameter, optimizer_steps)


def gradients(groups: list[dict[str, Any]]) -> dict[str, list[Tensor]]:
    """Whole gradients of parameter groups, by the part they are clipped with."""
    found: dict[str, list[Tensor]] = {}
    for group in groups:
        pieces = [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        found.setdefault(group.get(CLIP_GROUP, ""), []).extend(pieces)
    return {part: pieces for part, pieces in found.items() if pieces}


def optimizer_steps(optimizer: torch.optim.Optimizer) -> int:
    """Steps that a torch optimizer has made."""
    states = optimizer.state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)
