"""Curate: steps over a corpus to a selection, and a selection to a smaller corpus."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from curation.config import CurateConfig, MaterializeConfig
from curation.context import SCRATCH, Context, Inputs
from curation.earlier import SEEN, require_alike, write_seen
from curation.faces import FaceBlurrer
from curation.steps.balance import balance
from curation.steps.balance_text import balance_text
from curation.steps.config import CellSettings, Step, files_of
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
from curation.thresholds import with_thresholds
from infra import memory, selections
from infra.artifacts import Artifact, Input, Plan, produce
from infra.corpora import DECODING, Corpus
from infra.errors import UserError
from infra.hashing import hash_url
from infra.progress import progress
from infra.selections import Selection
from infra.shards import CorpusWriter
from pretrain.data.images import depth_of

VERSION = 4
_MATERIALIZE_VERSION = 2
_STATE = ".verdicts.npz"  # after the last finished step, while others are to come
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


def curate(config: CurateConfig) -> Artifact:
    """Apply the steps in order; return the selection artifact. An interrupted one goes on from its last finished step.

    Raises:
        UserError: an input is missing or belongs to another corpus, or a step leaves nothing.
    """
    inputs = Inputs.open(config)
    config = config.model_copy(update={"steps": with_thresholds(config.steps, inputs.embeddings)})
    if inputs.previous is not None:
        require_alike(inputs.previous, VERSION, config.decisive()["steps"], inputs.embeddings)
    plan = Plan("selection", "curate", VERSION, config.decisive(), inputs.by_name() | _listed(config))
    resume_from = [_STATE, f"{SCRATCH}/*"]
    return produce(plan, config.out, lambda directory: _select(config, inputs, directory), resume_from, config.restart)


def _listed(config: CurateConfig) -> dict[str, Input]:
    """The files that steps read: their content is an input like any other."""
    files = {f"step_{number}_{name}": url for number, step in enumerate(config.steps) for name, url in files_of(step)}
    return {name: Input(id=hash_url(url)[1], url=url) for name, url in files.items()}


def _select(config: CurateConfig, inputs: Inputs, directory: Path) -> Mapping[str, Any]:
    context = Context.begin(config, inputs, directory)
    state = directory / _STATE
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


def materialize(config: MaterializeConfig) -> Artifact:
    """Write the kept images of a selection as a corpus of their own, byte for byte unless faces are blurred; return it.

    Raises:
        UserError: the selection is not one over the corpus.
    """
    corpus, selection = Corpus.open(config.corpus), Selection.open(config.selection)
    selection.require_keys(corpus.table["key"], config.corpus)
    inputs = {"corpus": corpus.artifact.as_input(), "selection": selection.artifact.as_input()}
    settings: dict[str, Any] = {"shard_mb": config.shard_mb}
    redact = None
    if config.blur_faces is not None:
        redact = FaceBlurrer(config.blur_faces, depth_of(corpus)).blurred
        unread = {"model", "min_score" if config.blur_faces.model is None else "min_share"}
        settings["blur_faces"] = config.blur_faces.model_dump(mode="json", exclude=unread)
        if (model := config.blur_faces.model) is not None:
            inputs["face_model"] = Input(id=hash_url(model)[1], url=model)
    plan = Plan("corpus", "materialize", _MATERIALIZE_VERSION, settings, inputs)

    def write(directory: Path) -> Mapping[str, Any]:
        writer = CorpusWriter(directory, config.shard_mb << 20)
        kept = np.flatnonzero(selection.ledger["keep"].to_numpy(zero_copy_only=False))
        blurred = 0
        with progress("materialize", len(kept)) as advance:
            for row in kept:
                blurred += writer.copy(corpus, int(row), redact)
                advance()
        writer.finish()
        (directory / DECODING).write_text(json.dumps(corpus.decoding))
        told = {"images": len(kept), "classes": corpus.classes}
        return told if redact is None else told | {"blurred": blurred}

    return produce(plan, config.out, write, restart=config.restart)
