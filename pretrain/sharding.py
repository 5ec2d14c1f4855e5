"""How a training step is spread over ranks: plain torch, or DeepSpeed ZeRO. The only module that imports deepspeed."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra.errors import UserError
from pretrain.config import Optimizer, Schedule, Sharding
from pretrain.ranks import several_ranks


class Engine(Protocol):
    """Forward, backward and step of a sharded module, and its checkpoints."""

    module: nn.Module
    device: torch.device

    def forward(self, *args: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch; the loss is divided by the number of micro-batches here."""

    def step(self) -> None:
        """Call after every micro-batch; the optimiser moves after the last one of a step."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups as they are now: loading a checkpoint replaces them."""

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...


def build(
    module: nn.Module, groups: list[dict[str, Any]], optimizer: Optimizer, schedule: Schedule, sharding: Sharding
) -> Engine:
    """The engine the settings ask for, on this rank's device."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    module.to(device)
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=optimizer.betas, eps=optimizer.eps, foreach=True)
    kind = DeepSpeedEngine if sharding.engine == "deepspeed" else TorchEngine
    return kind(module, adamw, optimizer, schedule, sharding, device)


def world() -> tuple[int, int]:
    """(rank, world size), from the environment a launcher sets."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def average(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars, averaged over all ranks."""
    stacked = torch.stack([value.detach().float() for value in values.values()])
    if several_ranks():
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    return dict(zip(values, stacked.tolist(), strict=True))


def barrier() -> None:
    """Wait for all ranks."""
    if several_ranks():
        dist.barrier()


class TorchEngine:
    """One process, no sharding: what every sharded run is compared with."""

    def __init__(
        self,
        module: nn.Module,
        adamw: torch.optim.Optimizer,
        optimizer: Optimizer,
        schedule: Schedule,
        sharding: Sharding,
        device: torch.device,
    ) -> None:
        if world()[1] > 1:
            raise UserError("sharding.engine: torch runs in one process; choose deepspeed for several ranks")
        self.module, self.optimizer, self.device = module, adamw, device
        self.clip, self.accumulation = optimizer.clip, schedule.accumulation
        self._micro_steps = 0

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self._micro_steps += 1
        if self._micro_steps % self.accumulation:
            return
        if self.clip is not None:
            trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
            nn.utils.clip_grad_norm_(trained, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def save(self, directory: Path) -> None:
        torch.save(
            {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}, directory / "torch.pt"
        )

    def load(self, directory: Path) -> None:
        state = torch.load(directory / "torch.pt", map_location=self.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0, 1 or 2, under torchrun or in a single process."""

    def __init__(
        self,
        module: nn.Module,
        adamw: torch.optim.Optimizer,
        optimizer: Optimizer,
        schedule: Schedule,
        sharding: Sharding,
        device: torch.device,
    ) -> None:
        deepspeed = _import_deepspeed(device)
        _join_process_group(device)
        self.device = device
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw,
            config={
                "train_micro_batch_size_per_gpu": schedule.micro_batch,
                "gradient_accumulation_steps": schedule.accumulation,
                "gradient_clipping": optimizer.clip or 0.0,
                "zero_optimization": {"stage": sharding.zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 1 << 60,
                "wall_clock_breakdown": False,
            },
        )
        self.module: nn.Module = self.engine.module

    def forward(self, *args: Any) -> Any:
        return self.engine(*args)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.engine.optimizer.param_groups

    def save(self, directory: Path) -> None:
        self.engine.save_checkpoint(str(directory), tag="deepspeed", save_latest=False)

    def load(self, directory: Path) -> None:
        found, _ = self.engine.load_checkpoint(str(directory), tag="deepspeed")
        if found is None:
            raise UserError(f"{directory}: no DeepSpeed checkpoint; remove the folder to start from the beginning")


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed reads its own checkpoints with torch.load; nothing in one may run code.
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # Building this op takes minutes and serves only tensor parallelism.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _join_process_group(device: torch.device) -> None:
    """Join the launcher's process group, or make one of this process alone."""
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world()[1] > 1:
        dist.init_process_group(backend)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
