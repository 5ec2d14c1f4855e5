"""The steps of a curation in order, resumable after each."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from curation.config import CurateConfig
from curation.context import Context
from curation.earlier import SEEN, write_seen
from curation.inputs import SCRATCH, STATE, Inputs
from curation.steps.balance import balance
from curation.steps.balance_text import balance_text
from curation.steps.config import CellSettings, Step
from curation.steps.decontaminate import decontaminate
from curation.steps.exact import exact
from curation.steps.listed import remove, restore, sample
from curation.steps.metadata import filter_metadata
from curation.steps.near_duplicates import near_duplicates
from curation.steps.perceptual import filter_looks, perceptual
from curation.steps.retrieve import retrieve
from curation.steps.retrieve_clusters import retrieve_clusters
from curation.steps.score import score
from curation.steps.semdedup import semdedup
from infra import memory, selections
from infra.errors import UserError
from infra.progress import progress

_STEPS: dict[str, Callable[[Context, Any], Mapping[str, Any]]] = {
    "exact": exact,
    "perceptual": perceptual,
    "filter": filter_metadata,
    "looks": filter_looks,
    "remove": remove,
    "near_duplicates": near_duplicates,
    "decontaminate": decontaminate,
    "semdedup": semdedup,
    "retrieve": retrieve,
    "retrieve_clusters": retrieve_clusters,
    "balance": balance,
    "balance_text": balance_text,
    "score": score,
    "sample": sample,
    "restore": restore,
}


def select(config: CurateConfig, inputs: Inputs, directory: Path) -> Mapping[str, Any]:
    """Apply the steps and write the selection into a directory; return its metrics."""
    context = Context.begin(config, inputs, directory)
    state = directory / STATE
    before = int(context.verdicts.keep.sum())
    facts = context.verdicts.restore(state) if state.exists() else []
    for number, step in enumerate(config.steps):
        if number >= len(facts):
            _forget_other_scratch(directory, number)
            context.step = number
            facts.append(_apply(step, context))
            if not facts[-1]["kept"]:
                raise UserError(f"{config.corpus}: the step {step.kind} leaves no image; loosen it")
            context.verdicts.save(state, facts)
    selections.write(directory, context.verdicts.ledger())
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
    memory.forget_peak()
    images, done = int(context.verdicts.keep.sum()), 0
    with progress(step.kind.replace("_", " "), images) as advance:

        def reach(share: float) -> None:
            nonlocal done
            more = min(int(share * images), images) - done
            advance(more)
            done += more

        context.reach = reach
        if isinstance(step, CellSettings):
            write_seen(context.evidence_file(SEEN), context.verdicts.keep)
        told = _STEPS[step.kind](context, step)
        kept = int(context.verdicts.keep.sum())
        advance(images - done, note=f"{kept} kept")
    took = {"seconds": round(time.monotonic() - started, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
    return {"step": step.kind, "kept": kept, **told, **took, "peak_gb": memory.peak_gb()}
