"""The join of what is kept with itself, as several steps need it, with a measure of what it missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation import incremental
from curation.context import Context
from curation.incremental import PAIRS, PreviousSelection
from curation.similarity.audit import Recall, audit
from curation.similarity.cells import SAMPLE, Cells, default_num_cells
from curation.similarity.exact import is_zero
from curation.similarity.forest import Forest
from curation.similarity.nearest import similarities
from curation.similarity.selfjoin import PreviousJoin, SelfJoin
from curation.steps.config import CellSettings

_CURVE = 40  # thresholds of the curve
_OUTGROWN = 4  # times as many cells as there are would be made now


@dataclass(frozen=True)
class SimilarityJoin:
    """What a join found among some rows of the corpus."""

    rows: np.ndarray
    """Of the corpus, int64 `[m]`, rising"""
    labels: np.ndarray
    """Component of each, int32 `[m]`"""
    forest: Forest
    similarities: np.ndarray
    """Of the forest's pairs, exactly, float64"""
    cells: Cells
    recall: Recall | None

    def facts(self, threshold: float) -> dict[str, Any]:
        """What the manifest tells of it."""
        sizes = np.bincount(self.labels)
        told: dict[str, Any] = {
            "pairs": self.forest.pairs,
            "components": int((sizes > 1).sum()),
            "in_components": int(sizes[sizes > 1].sum()),
            "largest": int(sizes.max(initial=0)),
            "cells": len(self.cells),
            "curve": self.curve(threshold),
        }
        return told | ({} if self.recall is None else {"recall": self.recall.facts()})

    def curve(self, threshold: float) -> list[list[float]]:
        """How many images each higher threshold would merge away: [threshold, images]."""
        scores = np.sort(self.similarities)
        levels = np.round(np.linspace(threshold, 1.0, _CURVE + 1), 4)
        return [[float(level), int(len(scores) - np.searchsorted(scores, level))] for level in levels]

    def table(self) -> pa.Table:
        """The forest as pairs of corpus rows: from it the components at any higher threshold follow."""
        a, b, _ = self.forest.edges()
        return pa.table({"row": self.rows[a], "other": self.rows[b], "similarity": self.similarities})


def similarity_join(context: Context, settings: CellSettings, threshold: float) -> SimilarityJoin:
    """Join what is kept, on from what an earlier curation has joined; leave as evidence what a later one needs."""
    rows = context.state.kept_rows()
    cells, known = _prepare(context, settings, rows)
    join = SelfJoin(cells, threshold, context.workers, context.scratch(), context.memory)
    partition = join.partition(context.vectors, rows, known)
    forest = join.run_partition(partition, known, lambda done: context.report_progress(done / len(cells)))
    labels = forest.components()
    recall = None
    if settings.recall_audit_images:
        sample = np.sort(np.searchsorted(rows, context.shuffled(rows, settings.recall_audit_images, "audit")))
        recall = audit(context.vectors, rows, labels, threshold, sample, context.workers)
    a, b, _ = forest.edges()
    found = SimilarityJoin(rows, labels, forest, similarities(context.vectors, rows[a], rows[b]), cells, recall)
    context.evidence(PAIRS, found.table())
    incremental.write_cells(context.evidence_file("cells.npz"), cells)
    incremental.write_assignments(context.evidence_file("visits.npz"), partition)
    return found


def _prepare(context: Context, settings: CellSettings, rows: np.ndarray) -> tuple[Cells, PreviousJoin | None]:
    """Those of an earlier join, as long as they are not far too few for what the corpus has become."""
    if context.previous is not None:
        cells = context.previous.read_cells(context.step)
        if settings.num_cells or default_num_cells(len(rows)) <= _OUTGROWN * len(cells):
            return cells, _read_previous(context.previous, context.step, rows, len(context.corpus))
    return _cells(context, settings, rows), None


def _read_previous(before: PreviousSelection, step: int, rows: np.ndarray, images: int) -> PreviousJoin:
    """What an earlier join found among some rows of the corpus. What a component that lost a member held together is
    joined anew."""
    names = np.full(images, -1)
    names[rows] = np.arange(len(rows))
    edges, parted = before.read_forest(step, names)
    fresh = ~before.read_seen(step, rows)
    fresh[parted] = True
    names[rows[fresh]] = -1
    return PreviousJoin(before.read_assignments(step, names), edges, np.flatnonzero(fresh))


def _cells(context: Context, settings: CellSettings, rows: np.ndarray) -> Cells:
    count = min(settings.num_cells or default_num_cells(len(rows)), len(rows))
    if count == 1:
        return Cells.one(context.vectors.dim)
    sample = context.vectors.take(context.shuffled(rows, SAMPLE * count))
    sample = sample[~is_zero(sample)]
    if not len(sample):
        return Cells.one(context.vectors.dim)
    return Cells.learn(sample, min(count, len(sample)), settings.nprobe, settings.margin, context.workers)
