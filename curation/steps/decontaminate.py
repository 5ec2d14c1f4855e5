"""Decontamination: drop what an evaluation set already shows (DINOv2, appendix A)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation.context import Context, Reference
from curation.similarity.nearest import argmax_above
from curation.steps.config import Decontaminate
from curation.steps.similarity_join import similarity_join

_MARGIN = 0.15  # below the threshold, over which the histogram reaches
_BINS = 0.01


@dataclass(frozen=True)
class Hits:
    """Rows of the corpus that are somewhat like an evaluation image, with the one they are most like."""

    reference: Reference
    rows: np.ndarray
    others: np.ndarray
    scores: np.ndarray


def decontaminate(context: Context, step: Decontaminate) -> Mapping[str, Any]:
    """Drop images that an evaluation image is like, or that hang together with such."""
    threshold = step.threshold
    assert threshold is not None, "resolved before the steps run"
    rows = context.state.kept_rows()
    near = [_near(context, threshold, rows, reference) for reference in context.eval_embeddings]
    groups = None
    if step.count_components or step.drop == "components":
        found = similarity_join(context, step, threshold)
        groups = np.full(len(context.state.keep), -1, dtype=np.int32)
        groups[rows] = found.labels
    sets = {hits.reference.name: _facts(context, hits, threshold, groups) for hits in near}
    told: dict[str, Any] = {"sets": sets}
    if groups is not None:
        told |= {"components": found.facts(threshold)}
    leaking = _strongest(near, threshold)
    if step.drop == "components":
        assert groups is not None
        _drop_companions(context, step, rows, groups, leaking)
    for hits in leaking:
        context.state.drop(hits.rows, step.kind, "leak", hits.others, hits.scores, hits.reference.number)
    told["dropped"] = len(rows) - int(context.state.keep.sum())
    return told


def _near(context: Context, threshold: float, rows: np.ndarray, reference: Reference) -> Hits:
    """What is near one set; what an earlier curation has compared with it is not compared again."""
    before, known = None, np.zeros(len(rows), dtype=bool)
    if context.previous is not None:
        of = context.inputs.references()[reference.name]
        before, known = context.previous.read_hits(context.step, reference.name, of, rows)
    found = argmax_above(context.vectors, rows[~known], reference.vectors, threshold - _MARGIN, context.workers)
    near = pa.table({"row": found.rows, "evaluation_row": found.others, "similarity": found.scores})
    near = near if before is None else pa.concat_tables([near, before]).sort_by("row")
    context.evidence(reference.name, near)
    return Hits(reference, *(near[name].to_numpy() for name in near.column_names))


def _facts(context: Context, hits: Hits, threshold: float, groups: np.ndarray | None) -> dict[str, Any]:
    leaks = hits.scores >= threshold
    edges = np.round(np.arange(threshold - _MARGIN, 1 + _BINS, _BINS), 4)
    counts = np.histogram(np.minimum(hits.scores, edges[-1]), edges)[0]  # rounded vectors may be a little too long
    told: dict[str, Any] = {
        "name": hits.reference.label,
        "evaluation_images": len(hits.reference.vectors),
        "leaks": int(leaks.sum()),
        "evaluation_images_leaked": len(np.unique(hits.others[leaks])),
        "histogram": [[float(edge), int(count)] for edge, count in zip(edges, counts, strict=False)],
    }
    if groups is not None:
        with_companions = np.isin(groups, np.unique(groups[hits.rows[leaks]])) & (groups >= 0)
        told["in_their_components"] = int(with_companions.sum())
        told["collateral"] = told["in_their_components"] - told["leaks"]
    return told


def _strongest(near: list[Hits], threshold: float) -> list[Hits]:
    """The leaks of each set, each row where it is most similar; of equal sets the first."""
    rows = np.concatenate([hits.rows for hits in near])
    scores = np.concatenate([hits.scores for hits in near])
    of = np.repeat(np.arange(len(near)), [len(hits.rows) for hits in near])
    order = np.lexsort((of, -scores, rows))
    first = np.diff(rows[order], prepend=-1) != 0
    best = np.zeros(len(rows), dtype=bool)
    best[order[first]] = True
    best &= scores >= threshold
    return [_of(hits, best[of == number]) for number, hits in enumerate(near)]


def _of(hits: Hits, chosen: np.ndarray) -> Hits:
    return Hits(hits.reference, hits.rows[chosen], hits.others[chosen], hits.scores[chosen])


def _drop_companions(
    context: Context, step: Decontaminate, rows: np.ndarray, groups: np.ndarray, leaking: list[Hits]
) -> None:
    """Drop what hangs together with leaks, naming the strongest leak of the component."""
    leaks = np.concatenate([hits.rows for hits in leaking])
    scores = np.concatenate([hits.scores for hits in leaking])
    leaks = leaks[np.lexsort((context.state.ranks[leaks], -scores))]
    found, first = np.unique(groups[leaks], return_index=True)
    companions = rows[np.isin(groups[rows], found)]
    winners = leaks[first][np.searchsorted(found, groups[companions])]
    context.state.drop(companions, step.kind, "leak_component", winners, np.nan)
