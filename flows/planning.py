"""`fovea plan` on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pretrain.config import PlanConfig
from pretrain.planning.plan import STAGES, ResourcePlan

_GIB = 2**30


def show(config: PlanConfig, planned: ResourcePlan) -> None:
    """Print what a recipe needs on some GPUs, and where it fits."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(_facts(config, planned))
    console.print(_memory(config, planned))
    own = next(fit for fit in planned.fits if fit.images == planned.micro_batch)
    stage = config.sharding.zero_stage
    if own.by_stage[stage].total > planned.usable:
        console.print(_remedy(planned, stage))


def _facts(config: PlanConfig, planned: ResourcePlan) -> Table:
    size = planned.size
    table = Table.grid(padding=(0, 2))
    rows = {
        "backbone": f"{size.backbone / 1e6:,.1f} M parameters",
        "trained": f"{size.trained / 1e6:,.1f} M, with heads; {size.total / 1e6:,.1f} M with the teacher",
        "work": f"{planned.flops_per_image / 1e9:,.1f} GFLOP an image, forward and backward, teacher included",
        "schedule": f"{planned.images:,} images: {config.schedule.steps:,} steps of "
        f"{config.schedule.global_batch_size}",
        "time": f"{_format_duration(planned.days)} on {config.gpus} x {config.gpu} at {100 * config.mfu:.0f} % of "
        f"their peak ({planned.gpu_hours:,.0f} GPU-hours)",
    }
    if planned.cost is not None:
        rows["cost"] = f"{planned.cost:,.0f} at {config.price:g} a GPU-hour"
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    return table


def _format_duration(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{24 * days:,.1f} hours"


def _memory(config: PlanConfig, planned: ResourcePlan) -> Table:
    """GiB a rank by micro-batch and stage; what does not fit in red, the recipe's own choice marked."""
    table = Table(
        "micro-batch",
        *(f"ZeRO {stage}" for stage in STAGES),
        title=f"GiB a rank; {planned.usable / _GIB:.0f} of one {config.gpu} can be used",
        title_justify="left",
        box=None,
    )
    for fit in planned.fits:
        cells = []
        for stage in STAGES:
            needed = fit.by_stage[stage].total
            mark = " <" if (fit.images, stage) == (planned.micro_batch, config.sharding.zero_stage) else ""
            text = f"{needed / _GIB:,.1f}{mark}"
            cells.append(text if needed <= planned.usable else f"[red]{text} too much[/red]")
        table.add_row(str(fit.images), *cells)
    return table


def _remedy(planned: ResourcePlan, stage: int) -> str:
    fitting = [
        (fit.images, each) for fit in planned.fits for each in STAGES if fit.by_stage[each].total <= planned.usable
    ]
    if not fitting:
        return "[red]nothing here fits[/red]: use runtime.activation_checkpointing full, more GPUs, or larger ones"
    images, best = max(fitting, key=lambda each: (each[0], -each[1]))
    does_not = f"[red]ZeRO {stage} with {planned.micro_batch} images does not fit[/red]"
    return f"{does_not}; sharding.zero_stage {best} with runtime.micro_batch_size {images} does"
