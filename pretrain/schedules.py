"""What changes from step to step, as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.config import Optimizer, PretrainSettings, Schedule
from pretrain.models.config import VisionTransformerConfig


def cosine(first: float, last: float, step: int, steps: int) -> float:
    """Half a cosine from `first` at step 0 to `last` at `steps` and after."""
    if step >= steps:
        return last
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * step / steps))


def linear(first: float, last: float, step: int, steps: int) -> float:
    """A straight line from `first` at step 0 to `last` at `steps` and after."""
    return last if step >= steps else first + (last - first) * step / steps


@dataclass(frozen=True)
class Position:
    """The values of all schedules at one step."""

    lr: float
    weight_decay: float
    momentum: float
    temperature: float
    last_layer_frozen: bool


def peak_lr(optimizer: Optimizer, global_batch: int) -> float:
    """DINOv2's rule: base_lr * sqrt(global batch / reference batch)."""
    return optimizer.base_lr * math.sqrt(global_batch / optimizer.reference_batch)


def at(settings: PretrainSettings, step: int, global_batch: int) -> Position:
    """The schedules of a run at a step (DINOv2, train/train.py)."""
    optimizer, teacher, steps = settings.optimizer, settings.teacher, settings.schedule.steps
    peak, warmup = peak_lr(optimizer, global_batch), optimizer.warmup_steps
    lr = (
        linear(0, peak, step, warmup)
        if step < warmup
        else cosine(peak, optimizer.min_lr, step - warmup, steps - warmup)
    )
    return Position(
        lr=lr,
        weight_decay=cosine(*optimizer.weight_decay, step, steps),
        momentum=cosine(*teacher.momentum, step, steps),
        temperature=linear(*teacher.temperature, step, teacher.temperature_warmup_steps),
        last_layer_frozen=step < optimizer.freeze_last_layer_steps,
    )


def global_batch(schedule: Schedule, world_size: int) -> int:
    return schedule.micro_batch * schedule.accumulation * world_size


@dataclass(frozen=True)
class Multipliers:
    """How one parameter's learning rate and weight decay depart from the schedule."""

    lr: float
    weight_decay: float
    last_layer: bool


def multipliers(name: str, optimizer: Optimizer, model: VisionTransformerConfig, last_layer: bool) -> Multipliers:
    """DINOv2's rules (utils/param_groups.py) for a parameter of the learner, by its name.

    Layer decay counts embeddings and tokens as layer 0 and block i as i + 1; biases, norms and LayerScale have no
    weight decay, tokens and position embeddings do.
    """
    lr = 1.0
    if name.startswith("student."):
        lr = optimizer.layer_decay ** (model.depth + 1 - _layer(name.removeprefix("student."), model.depth))
    if "patch_embed" in name:
        lr *= optimizer.patch_embed_lr
    plain = name.endswith(".bias") or "norm" in name or "gamma" in name
    return Multipliers(lr, 0.0 if plain and not last_layer else 1.0, last_layer)


def _layer(name: str, depth: int) -> int:
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    tokens = ("patch_embed", "pos_embed", "cls_token", "reg_token", "mask_token")
    return 0 if name.startswith(tokens) else depth + 1
