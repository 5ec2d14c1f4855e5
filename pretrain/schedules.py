"""What changes from step to step, as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infra.errors import UserError
from pretrain.config import Optimizer, TrainingSettings

if TYPE_CHECKING:
    from pretrain.train_module import StudentBranch


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """Half a cosine from `first` at step 0 to `last` at `steps` and after."""
    if step >= steps:
        return last
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * step / steps))


def linear(first: float, last: float, step: int, steps: int) -> float:
    """A straight line from `first` at step 0 to `last` at `steps` and after."""
    return last if step >= steps else first + (last - first) * step / steps


@dataclass(frozen=True)
class ScheduleValues:
    """The values of all schedules at one step."""

    lr: float
    weight_decay: float
    momentum: float
    temperature: float
    last_layer_frozen: bool


def peak_lr(optimizer: Optimizer, batch: int) -> float:
    """base_lr by the optimizer's rule: times sqrt(b), b or 1, where b = global batch / reference batch."""
    relative = batch / optimizer.lr_reference_batch_size
    return optimizer.base_lr * {"sqrt": math.sqrt(relative), "linear": relative, "none": 1.0}[optimizer.lr_scaling]


def learning_rate(optimizer: Optimizer, step: int, steps: int, batch: int) -> float:
    """A linear warmup from 0, then half a cosine or a constant."""
    peak, warmup = peak_lr(optimizer, batch), optimizer.warmup_steps
    if step < warmup:
        return linear(0, peak, step, warmup)
    return (
        peak if optimizer.lr_schedule == "constant" else cosine(peak, optimizer.min_lr, step - warmup, steps - warmup)
    )


def schedule_values(settings: TrainingSettings, step: int) -> ScheduleValues:
    """The schedules of a run at a step (DINOv2, train/train.py)."""
    optimizer, teacher, steps = settings.optimizer, settings.teacher, settings.schedule.steps
    return ScheduleValues(
        lr=learning_rate(optimizer, step, steps, settings.schedule.global_batch_size),
        weight_decay=cosine(*optimizer.weight_decay, step, steps),
        momentum=cosine(*teacher.momentum, step, steps),
        temperature=linear(*teacher.temperature, step, teacher.temperature_warmup_steps),
        last_layer_frozen=step < optimizer.freeze_last_layer_steps,
    )


def split_global_batch(settings: TrainingSettings, world_size: int) -> tuple[int, int]:
    """(micro-batch of a rank, micro-batches a step) that make up the global batch.

    Raises:
        UserError: it cannot be spread evenly.
    """
    batch, micro_batch = settings.schedule.global_batch_size, settings.runtime.micro_batch_size or 0
    micro_batch = micro_batch or batch // world_size
    if not micro_batch or batch % (world_size * micro_batch):
        raise UserError(
            f"schedule.global_batch_size: {batch} is no multiple of {world_size} ranks times runtime.micro_batch_size "
            f"{micro_batch or 1}; change one of them"
        )
    return micro_batch, batch // (world_size * micro_batch)


@dataclass(frozen=True)
class Multipliers:
    """How one parameter's learning rate and weight decay depart from the schedule."""

    lr: float
    weight_decay: float
    last_layer: bool


def multipliers(
    name: str, dimensions: int, optimizer: Optimizer, branch: StudentBranch, last_layer: bool
) -> Multipliers:
    """DINOv2's rules (utils/param_groups.py) for a parameter of a student, by its name and number of dimensions.

    Layer decay counts embeddings and tokens as layer 0 and block i as i + 1. Vectors and scalars (biases, norms,
    LayerScale, CLIP's scale) have no weight decay, tokens and position tables only if the optimizer says so.
    """
    lr, depth = branch.lr, getattr(branch.student.config, "depth", None)
    if name.startswith("student.") and depth is not None:  # networks of timm have no layers that we know of
        lr *= optimizer.layerwise_lr_decay ** (depth + 1 - _layer(name.removeprefix("student."), depth))
    if "patch_embed" in name:
        lr *= optimizer.patch_embed_lr_mult
    token = name.endswith(_TOKENS) and not optimizer.weight_decay_tokens
    return Multipliers(lr, 0.0 if dimensions < 2 or token else 1.0, last_layer)


_TOKENS = ("pos_embed", "cls_token", "reg_token", "mask_token")


def _layer(name: str, depth: int) -> int:
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("patch_embed", *_TOKENS)) else depth + 1
