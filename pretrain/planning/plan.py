"""Parameters, work, memory, days and cost of a recipe on some GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import PlanConfig
from pretrain.planning import hardware, memory
from pretrain.planning.dryrun import ParameterCounts, build_on_meta, count_flops, count_parameters, measure_peak
from pretrain.planning.memory import Memory
from pretrain.schedules import split_global_batch
from pretrain.train import build_module

STAGES = (0, 1, 2, 3)
_USABLE = 0.92  # of a GPU's memory; the driver, NCCL and what the allocator cannot fit together take the rest
_DRY = (4, 8)  # micro-batches that are run dry; others lie on their line


@dataclass(frozen=True)
class Fit:
    """What a rank needs with a micro-batch of some images."""

    images: int
    by_stage: dict[int, Memory]


@dataclass(frozen=True)
class ResourcePlan:
    """A recipe on some GPUs."""

    size: ParameterCounts
    flops_per_image: float
    images: int
    """Over the whole schedule."""
    fits: list[Fit]
    """By micro-batch, the recipe's own among them."""
    micro_batch: int
    """The recipe's own."""
    usable: float
    """Bytes of a GPU that can be used."""
    gpu_hours: float
    days: float
    cost: float | None


def plan(config: PlanConfig) -> ResourcePlan:
    """Run a recipe dry and reckon.

    Raises:
        UserError: the GPU is not known, or the global batch cannot be spread over so many.
    """
    own, _ = split_global_batch(config, config.gpus)
    plain = config.model_copy(update={"model": config.model.model_copy(update={"attention": "sdpa"})})
    learner = build_on_meta(lambda: build_module(plain))
    peaks = {images: measure_peak(learner, config, images) for images in _DRY}
    flops_per_image = count_flops(learner, config, _DRY[-1]) / _DRY[-1]
    images = config.schedule.steps * config.schedule.global_batch_size
    gpu_hours = images * flops_per_image / (_reach(config) * config.mfu) / 3600
    return ResourcePlan(
        size=count_parameters(learner),
        flops_per_image=flops_per_image,
        images=images,
        fits=[find_fit(count_parameters(learner), peaks, images, config) for images in _sizes(own, config)],
        micro_batch=own,
        usable=_USABLE * (config.gib or hardware.gpu(config.gpu).memory) * 2**30,
        gpu_hours=gpu_hours,
        days=gpu_hours / config.gpus / 24,
        cost=None if config.price is None else config.price * gpu_hours,
    )


def _reach(config: PlanConfig) -> float:
    """FLOP/s of one GPU."""
    if config.tflops is not None:
        return 1e12 * config.tflops
    known = hardware.gpu(config.gpu)
    return 1e12 * (known.bf16 if config.sharding.precision == "bf16" else known.fp32)


def _sizes(own: int, config: PlanConfig) -> list[int]:
    """Micro-batches that make up the global batch, from a quarter of the recipe's own to four times it."""
    worth = {max(own // 4, 1), max(own // 2, 1), own, 2 * own, 4 * own}
    return sorted(each for each in worth if config.schedule.global_batch_size % (each * config.gpus) == 0)


def find_fit(size: ParameterCounts, peaks: dict[int, int], images: int, config: PlanConfig) -> Fit:
    passes = memory.activations(peaks, images)
    accumulates = config.schedule.global_batch_size > images * config.gpus
    found = {
        stage: memory.memory_of_rank(size, passes, stage, config.gpus, accumulates, config.sharding) for stage in STAGES
    }
    return Fit(images, found)
