"""DeepSpeed ZeRO. The only module that imports deepspeed.

Parameters are float32 everywhere (autocast makes matrix products bf16), so the teacher, which is frozen and part of the
same module, is sharded with the student at stage 3, and its moving average is taken shard by shard.

An offloaded optimizer's gradients are out of reach between the backward pass and the step: DeepSpeed keeps the norm of
each parameter's piece, and they are clipped as torch's optimizer gets them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.config import Sharding
from pretrain.distributed import all_reduce_sum, init_process_group
from pretrain.models.blocks import Block
from pretrain.models.timm_network import TimmNetwork
from pretrain.sharding.base import (
    BUCKET,
    CLIP_GROUP,
    LIVE,
    Moment,
    Pairs,
    StepResult,
    adamw_state,
    clip_factors,
    clip_gradients,
    ema_lerp,
    ema_tensors,
)
from pretrain.sharding.single_process import gradients, optimizer_steps


class DeepSpeedBackend:
    """DeepSpeed with ZeRO 0 to 3, under torchrun or in a single process."""

    def __init__(
        self,
        module: nn.Module,
        adamw: torch.optim.Optimizer,
        largest_norm: float | None,
        sharding: Sharding,
        spread: tuple[int, int],
        device: torch.device,
    ) -> None:
        deepspeed = import_deepspeed(device)
        init_process_group(device)
        self.device, self.stage, self.largest_norm = device, sharding.zero_stage, largest_norm
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=_settings(sharding, spread))
        self.module: nn.Module = self.engine.module
        if self.stage == 3:
            _gather_blocks(deepspeed, module)
        self._gathered = deepspeed.zero.GatheredParameters
        self._linked = False
        self._offloaded = sharding.offload_optimizer != "none"
        self._optimizer_in_files = sharding.offload_optimizer == "nvme"
        self._factors: dict[str, float] = {}
        if self._offloaded:
            self._adamw.register_step_pre_hook(self._scale)

    def forward(self, *args: Any) -> Any:
        return self.engine(*args)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> StepResult | None:
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return None
        stepped = self._clipped()
        self.engine.step()
        if self.stage and stepped.applied == self.engine.optimizer.overflow:
            raise AssertionError(
                f"DeepSpeed's overflow is {self.engine.optimizer.overflow}, ours {not stepped.applied}"
            )
        return stepped

    @torch.no_grad()
    def _clipped(self) -> StepResult:
        """Clip what is about to be stepped on. Where it is no number, stages 1 to 3 see that by themselves."""
        if self._offloaded:
            return self._to_be_clipped()
        if self.stage:
            pieces = self._pieces()
            stepped = clip_gradients(pieces, self.largest_norm, all_reduce_sum)
            if not stepped.applied:  # finite gradients whose norm is not, too
                next(iter(pieces.values()))[0].fill_(torch.nan)
            return stepped
        stepped = clip_gradients(gradients(self.parameter_groups()), self.largest_norm, lambda squares: squares)
        if not stepped.applied:
            for parameter in self.module.parameters():
                parameter.grad = None
        return stepped

    def _pieces(self) -> dict[str, list[Tensor]]:
        """This rank's pieces of the averaged gradients, by the part they are clipped with."""
        optimizer, groups = self.engine.optimizer, self.parameter_groups()
        found: dict[str, list[Tensor]] = {}
        for number, pieces in optimizer.averaged_gradients.items():
            found.setdefault(groups[self._group(number)][CLIP_GROUP], []).extend(pieces)
        return dict(sorted(found.items()))

    def _to_be_clipped(self) -> StepResult:
        """Find what `_scale` will multiply by. DeepSpeed goes by its own norms when it skips a step: spoil them."""
        norms = self._norms()
        stepped, factors = clip_factors(norms, self.largest_norm, all_reduce_sum)
        self._factors = dict(zip(norms, factors.tolist(), strict=True))
        if not stepped.applied:
            for norm in self.engine.optimizer.norm_for_param_grads.values():
                norm.fill_(torch.nan)
        return stepped

    def _norms(self) -> dict[str, list[Tensor]]:
        """Norms of this rank's pieces of the averaged gradients, by the part they are clipped with."""
        optimizer, groups = self.engine.optimizer, self.parameter_groups()
        parts = sorted({group[CLIP_GROUP] for group in groups})
        found = {part: [torch.zeros((), device=self.device)] for part in parts}  # a rank may hold nothing of a part
        for parameter, norm in optimizer.norm_for_param_grads.items():
            group = groups[self._group(optimizer.grad_position[parameter][0])]
            found[group[CLIP_GROUP]].append(norm.float())  # of float64, whose squares would not overflow as theirs do
        return found

    def _scale(self, adamw: torch.optim.Optimizer, *_: Any) -> None:
        """Clip the gradients of an offloaded optimizer that is about to step."""
        for group in adamw.param_groups:
            for tensor in group["params"]:
                tensor.grad.mul_(self._factors[group[CLIP_GROUP]])

    def _group(self, number: int) -> int:
        """The parameter group of a tensor that the wrapped optimizer sees."""
        return self.engine.optimizer.sub_group_to_group_id[number] if self.stage == 3 else number

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.engine.optimizer.param_groups

    @torch.no_grad()
    def ema_update(self, pairs: Pairs, momentum: float) -> None:
        sources, averages = ema_tensors(pairs)
        ema_lerp([self._shard(each) for each in sources], [self._shard(each) for each in averages], momentum)

    def _shard(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a tensor: at stage 3 a part of a parameter, of source and average the same."""
        sharded = self.stage == 3 and isinstance(tensor, nn.Parameter)
        return tensor.ds_tensor.data if sharded else tensor.data  # type: ignore[attr-defined]

    @torch.no_grad()
    def moment(self, parameter: nn.Parameter, which: Moment) -> Tensor | None:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.stage == 0:
            return self._adamw.state[parameter].get(which) if parameter in self._adamw.state else None
        if self.optimizer_steps == 0:
            return None
        self._link_moments()
        return safe_get_full_optimizer_state(parameter, which)

    def _link_moments(self) -> None:
        """Tell DeepSpeed's parameters where their moments are: by itself it does so after the first group's first step,
        when the other groups have none."""
        if self.stage in (1, 2) and not self._linked:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()
            self._linked = True

    @torch.no_grad()
    def full_param(self, parameter: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return parameter.detach()
        with self._gathered([parameter]):
            return parameter.detach().clone()

    @torch.no_grad()
    def set_param(self, parameter: nn.Parameter, value: Tensor, moment: Moment | None = None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(self.device)
        if moment is not None:
            if self.stage == 0:
                self._adamw.state[parameter][moment].copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value, moment)
            return
        if self.stage == 3:
            with self._gathered([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)
        if parameter.requires_grad and self.stage > 0:
            safe_set_full_fp32_param(parameter, value)  # the optimizer's own copy

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        return self.engine.optimizer if self.stage == 0 else self.engine.optimizer.optimizer

    @property
    def optimizer_steps(self) -> int:
        return optimizer_steps(self._adamw)

    def expect_moments(self, parameters: Sequence[nn.Parameter], optimizer_steps: int) -> None:
        self._adamw.state.clear()
        if self._optimizer_in_files:
            self.engine.optimizer.optimizer_swapper.purge_state()
        for number, tensor in enumerate(self._optimized(parameters)):
            with self._state_in_memory(number):
                self._adamw.state[tensor] = adamw_state(tensor, optimizer_steps)
        self._linked = False
        self._link_moments()

    @contextmanager
    def _state_in_memory(self, number: int) -> Iterator[None]:
        """Read a tensor that the wrapped optimizer sees where it is in a file; write it and its state there again."""
        optimizer = self.engine.optimizer
        swapped = self._optimizer_in_files and optimizer._swappable_optimizer_subgroup(number)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(number)
        yield
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_out(number)

    def _optimized(self, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor]:
        """The tensors that the wrapped optimizer sees: parameters, or this rank's part of many of them in one."""
        optimizer = self.engine.optimizer
        if self.stage == 0:
            return parameters
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups


def _settings(sharding: Sharding, spread: tuple[int, int]) -> dict[str, Any]:
    buckets = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, "stage3_prefetch_bucket_size": BUCKET}
    zero: dict[str, Any] = {"stage": sharding.zero_stage, "stage3_max_live_parameters": LIVE, **buckets}
    for what, device in (("optimizer", sharding.offload_optimizer), ("param", sharding.offload_parameters)):
        if device != "none":
            zero[f"offload_{what}"] = {"device": device, "nvme_path": sharding.nvme_path, "pin_memory": True}
    if sharding.zero_stage == 3:
        # Small parameters that stayed whole would not see what is written to their shards.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": spread[0],
        "gradient_accumulation_steps": spread[1],
        "gradient_clipping": 0.0,  # ours
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # theirs would be compiled when it is first used
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }


def _gather_blocks(deepspeed: Any, module: nn.Module) -> None:
    """Have stage 3 gather each block as a whole: it reads the weights of modules in it without calling them. So are
    networks of timm, whose methods are called by other names than forward."""
    for part in module.modules():
        if isinstance(part, Block | TimmNetwork):
            for parameter in part.parameters():
                deepspeed.zero.register_external_parameter(part, parameter)


def import_deepspeed(device: torch.device) -> Any:
    """The package, told what it runs on and to be quiet."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # Building this op takes minutes and serves only tensor parallelism.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
