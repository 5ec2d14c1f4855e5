"""Instance retrieval and copy detection by nearest vectors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torchmetrics.functional.classification import binary_average_precision

from eval.context import EvalContext
from eval.data.annotations import read_json
from eval.eval_model import EvalModel
from eval.protocols.config import CopyDetection, Retrieval
from eval.stats.scores import ProtocolResult, Score
from infra.compute.sharded_array import l2_normalize
from infra.compute.vector_search import knn_search
from infra.config import Config
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from pretrain.data.images import read_image

Box = tuple[float, float, float, float]


def _validate_box(box: Box) -> Box:
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError("a box is left, top, right, bottom")
    return box


class GroundTruth(Config):
    """What a query of Oxford or Paris should find."""

    easy: list[str] = Field(default_factory=list)
    """Keys of images that show the place clearly."""
    hard: list[str] = Field(default_factory=list)
    """Keys of images that show it badly."""
    junk: list[str] = Field(default_factory=list)
    """Keys of images that count neither way."""
    box: Annotated[Box, AfterValidator(_validate_box)] | None = None
    """What the query is cut to, in pixels: left, top, right, bottom."""


_SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("easy", "junk")),
    "easy": (("easy",), ("hard", "junk")),
}
"""Of each setting what is right, and what counts neither way (arXiv 1803.11285, section 3)."""


def retrieval(task: Retrieval, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Mean average precision in the settings medium, hard and easy."""
    corpus, queries = context.corpus(task.test), context.corpus(task.queries)
    truth = read_json(task.ground_truth, dict[str, GroundTruth])
    rows, asked = _rows(corpus), _rows(queries)
    keys = [key for key in truth if _row_of_key(key, asked, task.ground_truth)]
    cut = [(asked[key], truth[key].box) for key in keys]
    vectors = np.concatenate(list(_crop_queries(model, queries, cut)))
    order = np.argsort(-(vectors @ model.vectors(corpus).T), axis=1, kind="stable")
    scores = []
    for name, (right, passed) in _SETTINGS.items():
        values = []
        for place, key in enumerate(keys):
            wanted = _places(truth[key], right, rows, task.ground_truth)
            if wanted:
                ranked = order[place][~np.isin(order[place], _places(truth[key], passed, rows, task.ground_truth))]
                values.append(revisited_precision(np.flatnonzero(np.isin(ranked, wanted))))
        if values:
            scores.append(_mean(context, task, model, f"mAP, {name}", np.array(values)))
    if not scores:
        raise UserError(f"{task.ground_truth}: no query has an answer; give easy and hard lists of keys")
    return ProtocolResult(scores)


def _mean(context: EvalContext, task: Retrieval, model: EvalModel, metric: str, values: np.ndarray) -> Score:
    scorer = context.scorer(task, model.name)
    return scorer.score_images(metric, len(values), lambda rows: float(values[rows].mean()), note="over queries")


def _crop_queries(model: EvalModel, corpus: Corpus, queries: list[tuple[int, Box | None]]) -> Iterator[np.ndarray]:
    """Unit vectors of queries cut to their boxes."""
    for row, box in queries:
        image = read_image(corpus, row)
        image = image if box is None else image.crop((round(box[0]), round(box[1]), round(box[2]), round(box[3])))
        found = model.backbone.features(torch.as_tensor(np.array(model.backbone.preprocess(image)))[None]).numpy()
        yield l2_normalize(found)


def revisited_precision(places: np.ndarray) -> float:
    """Average precision as Oxford and Paris define it: the area under the curve by trapezoids.

    Args:
        places: of all right answers in the ranking, from 0, ascending.
    """
    found = np.arange(len(places))
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    return float(((before + (found + 1) / (places + 1)) / 2).mean())


def copy_detection(task: CopyDetection, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Micro average precision of all pairs of queries and near references, and recall at a precision of 90 %."""
    references, queries = context.corpus(task.test), context.corpus(task.queries)
    truth, rows, asked = read_json(task.ground_truth, dict[str, list[str]]), _rows(references), _rows(queries)
    wanted = {
        (asked[query], rows[original])
        for query, originals in truth.items()
        for original in originals
        if _row_of_key(query, asked, task.ground_truth) and _row_of_key(original, rows, task.ground_truth)
    }
    if not wanted:
        raise UserError(f"{task.ground_truth}: names no copies; give lists of originals by the keys of queries")
    count = min(task.num_candidates, len(references))
    cosines, found = knn_search(model.vectors(queries), model.vectors(references), count)
    right = np.array([[(query, int(row)) in wanted for row in near] for query, near in enumerate(found)])
    scorer, pairs = context.scorer(task, model.name), len(wanted)
    note = f"{pairs} pairs"

    originals = np.bincount([query for query, _ in wanted], minlength=len(queries))

    def value(some: np.ndarray) -> float:
        total = int(originals[some].sum())
        return micro_precision(cosines[some].ravel(), right[some].ravel(), total) if total else float("nan")

    precise = recall_at_precision(cosines.ravel(), right.ravel(), pairs, 0.9)
    return ProtocolResult(
        [
            scorer.score_images("µAP", len(queries), value, note=note),
            scorer.score_value("recall at precision 90 %", precise, len(queries), note, is_fraction=True),
        ]
    )


def micro_precision(scores: np.ndarray, right: np.ndarray, wanted: int) -> float:
    """Average precision of pairs in one ranking, where `wanted` pairs should be found and others may be missing."""
    if not right.any():
        return 0.0
    shares = ((scores.astype(np.float64) + 1) / 2).clip(0, 1)  # what is no share it would squeeze into one
    found = binary_average_precision(torch.from_numpy(shares), torch.from_numpy(right.astype(np.int64)))
    return float(found) * float(right.sum()) / wanted


def recall_at_precision(scores: np.ndarray, right: np.ndarray, wanted: int, precision: float) -> float:
    """The largest share of the wanted pairs that some threshold finds at this precision."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    last_of_equals = np.append(np.diff(scores[order]) != 0, True)
    good = (hits / np.arange(1, len(hits) + 1) >= precision) & last_of_equals
    return float(hits[good].max() / wanted) if good.any() else 0.0


def _rows(corpus: Corpus) -> dict[str, int]:
    return {key: row for row, key in enumerate(corpus.keys)}


def _row_of_key(key: str, rows: Mapping[str, int], file: str) -> bool:
    if key not in rows:
        raise UserError(f"{file}: {key}: no image of the dataset has this key; fix the file")
    return True


def _places(answers: GroundTruth, lists: Collection[str], rows: Mapping[str, int], file: str) -> list[int]:
    return [rows[key] for name in lists for key in getattr(answers, name) if _row_of_key(key, rows, file)]
