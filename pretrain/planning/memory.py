"""Bytes that a rank needs at the fullest moment of a step, by ZeRO stage.

Everything is float32 and whole unless a stage shards it. What the passes keep comes from the dry run; the rest was read
off torch's allocator under DeepSpeed 0.19 (`tests/test_pretrain_planning.py` compares the two).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.config import Sharding
from pretrain.planning.dryrun import ParameterCounts
from pretrain.sharding.base import BUCKET, LIVE

_FLOAT = 4
_GROWTH = 1.05  # while the backward pass frees what was kept, gradients come faster than it does


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: int
    """Student, teacher and heads."""
    optimizer: int
    """Moments, and under ZeRO an own copy of the parameters."""
    passing: int
    """Activations, gradients, buffers and temporary tensors at the fullest moment."""

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.passing


def activations(peaks: Mapping[int, int], images: int) -> int:
    """Peak bytes of the passes of a micro-batch, on the line through two that were run dry, by their images."""
    (few, less), (many, more) = sorted(peaks.items())
    return int(more + (more - less) / (many - few) * (images - many))


def memory_of_rank(
    size: ParameterCounts, passes: int, stage: int, ranks: int, accumulates: bool, sharding: Sharding
) -> Memory:
    """Memory of a rank.

    Args:
        passes: peak bytes of a micro-batch's forward and backward passes.
        stage: ZeRO stage.
        accumulates: several micro-batches make a step.
        sharding: tells what is offloaded.
    """
    whole, trained = _FLOAT * size.total, _FLOAT * size.trained
    part, bucket = trained // ranks, _FLOAT * BUCKET
    if stage == 0:
        held = trained if accumulates else 0
        passing = max(held + int(_GROWTH * passes), 2 * trained)  # gradients and AdamW's temporary tensors
        return Memory(whole, 2 * trained, passing)
    optimizer, gradients = (3 * part, part) if sharding.offload_optimizer == "none" else (0, 0)
    if stage == 3:
        live = min(whole, _FLOAT * LIVE) + min(whole, bucket)  # and what is fetched ahead
        parameters = whole // ranks if sharding.offload_parameters == "none" else 0
        return Memory(parameters, optimizer, 2 * gradients + bucket + live + passes)
    held = 0 if not accumulates else trained if stage == 1 else part
    fullest = trained + gradients if stage == 1 else gradients
    return Memory(whole, optimizer, bucket + max(held + int(_GROWTH * passes), fullest, 2 * gradients))
