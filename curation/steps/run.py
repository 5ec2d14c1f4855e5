"""The steps of a curation in order, resumable after each."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from curation.config import CurateConfig
from curation.context import Context
from curation.incremental import SEEN, write_seen
from curation.inputs import SCRATCH, STATE, Inputs
from curation.steps.balance import balance
from curation.steps.config import CellSettings, Step
from curation.steps.decontaminate import decontaminate
from curation.steps.exact import exact
from curation.steps.image_quality import image_quality
from curation.steps.key_filters import exclude, restore
from curation.steps.metaclip import metaclip
from curation.steps.metadata_filter import metadata_filter
from curation.steps.near_duplicates import near_duplicates
from curation.steps.perceptual import perceptual
from curation.steps.random_sample import random_sample
from curation.steps.retrieve import retrieve
from curation.steps.retrieve_clusters import retrieve_clusters
from curation.steps.score import score
from curation.steps.semdedup import semdedup
from infra.compute import memory
from infra.corpus import selection
from infra.errors import UserError
from infra.progress import progress

_STEPS: dict[str, Callable[[Context, Any], Mapping[str, Any]]] = {
    "exact": exact,
    "perceptual": perceptual,
    "metadata_filter": metadata_filter,
    "image_quality": image_quality,
    "exclude": exclude,
    "near_duplicates": near_duplicates,
    "decontaminate": decontaminate,
    "semdedup": semdedup,
    "retrieve": retrieve,
    "retrieve_clusters": retrieve_clusters,
    "balance": balance,
    "metaclip": metaclip,
    "score": score,
    "random_sample": random_sample,
    "restore": restore,
}


def select(config: CurateConfig, inputs: Inputs, directory: Path) -> Mapping[str, Any]:
    """Apply the steps and write the selection into a directory; return its metrics."""
    context = Context.begin(config, inputs, directory)
    state = directory / STATE
    before = int(context.state.keep.sum())
    facts = context.state.restore(state) if state.exists() else []
    for number, step in enumerate(config.steps):
        if number >= len(facts):
            _forget_other_scratch(directory, number)
            context.step = number
            facts.append(_apply(step, context))
            if not facts[-1]["kept"]:
                raise UserError(f"{config.corpus}: the step {step.kind} leaves no image; loosen it")
            context.state.save(state, facts)
    selection.write(directory, context.state.to_table())
    funnel = [{"step": "input", "kept": before}, *({"step": each["step"], "kept": each["kept"]} for each in facts)]
    return {"images": len(context.corpus), "kept": facts[-1]["kept"], "funnel": funnel, "steps": facts}


def _forget_other_scratch(directory: Path, number: int) -> None:
    """Remove what earlier steps needed; an interrupted attempt at this one may go on from its own."""
    for folder in (directory / SCRATCH).glob("*"):
        if folder.name != f"{number:02d}":
            shutil.rmtree(folder)


def _apply(step: Step, context: Context) -> dict[str, Any]:
    """Do one step; return what it tells, with what it left and what it took."""
    started, cpu = time.monotonic(), time.process_time()
    memory.reset_peak_memory()
    images, done = int(context.state.keep.sum()), 0
    with progress(step.kind.replace("_", " "), images) as advance:

        def reach(share: float) -> None:
            nonlocal done
            more = min(int(share * images), images) - done
            advance(more)
            done += more

        context.report_progress = reach
        if isinstance(step, CellSettings):
            write_seen(context.evidence_file(SEEN), context.state.keep)
        told = _STEPS[step.kind](context, step)
        kept = int(context.state.keep.sum())
        advance(images - done, note=f"{kept} kept")
    took = {"seconds": round(time.monotonic() - started, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
    return {"step": step.kind, "kept": kept, **told, **took, "peak_gb": memory.peak_memory_gb()}
