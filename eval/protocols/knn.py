"""Weighted k-nearest-neighbor classification, the protocol of DINO (arXiv 2104.14294, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from eval.context import EvalContext
from eval.eval_model import EvalModel
from eval.protocols.classification import sample_per_class, score_classification
from eval.protocols.config import Knn
from eval.report.charts import scatter_with_trend
from eval.report.pictures.neighbors import neighbor_sheet
from eval.stats.rng import make_rng
from eval.stats.scores import ProtocolResult, Score
from infra.compute.vector_search import knn_search
from infra.corpus.corpus import Corpus

_CHOOSING = 5000  # training images, at most, that choose k


def knn(task: Knn, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Accuracy at each k, the chosen one first."""
    names = context.require_same_classes(task.train, task.test)
    classes = len(names)
    train, test = context.corpus(task.train), context.corpus(task.test)
    bank, labels, queries = model.vectors(train), train.labels, model.vectors(test)
    scorer, leaked = context.scorer(task, model.name), context.leaked.get(task.test)
    ks = sorted({min(k, len(bank)) for k in task.k})
    cosines, rows = knn_search(queries, bank, ks[-1])

    def votes(k: int) -> np.ndarray:
        return count_votes(cosines[:, :k], labels[rows[:, :k]], classes, task.temperature)

    each = [scorer.score_accuracy(f"accuracy, k = {k}", votes(k).argmax(1) == test.labels, leaked) for k in ks]
    k, curve = _choose_k(task, bank, labels, classes, ks, [score.value for score in each])

    def classify(corpus: Corpus) -> np.ndarray:
        if corpus is test:
            return votes(k)
        return predict(bank, labels, model.vectors(corpus), classes, k, task.temperature)

    outcome = score_classification(task, model, context, names, classify, f"accuracy, k = {k}")
    others = [score for score in each if score.metric != outcome.scores[0].metric]
    pictures = dict(outcome.pictures)
    if model.name == "model" and context.settings.pictures:
        pictures |= {"curve": scatter_with_trend(ks, curve, "k", "accuracy")} if len(ks) > 1 else {}
        pictures["neighbors"] = neighbor_sheet(train, test, bank, queries, context.settings.pictures)
    scores = [*outcome.scores[:1], *others, *outcome.scores[1:], *_score_few(task, model, context, k, queries)]
    return replace(outcome, scores=scores, pictures=pictures)


def predict(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, classes: int, k: int, temperature: float
) -> np.ndarray:
    """Votes for each class, float32 `[q, classes]`.

    Args:
        bank: labeled vectors of unit length, float32 `[n, dim]`.
        labels: their classes, int64 `[n]`.
        queries: vectors of unit length, float32 `[q, dim]`.
        k: how many neighbors vote; all where there are fewer.
        temperature: a neighbor's vote weighs exp(cosine / temperature).
    """
    cosines, rows = knn_search(queries, bank, min(k, len(bank)))
    return count_votes(cosines, labels[rows], classes, temperature)


def count_votes(cosines: np.ndarray, labels: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """Votes of neighbors `[q, k]` for each class, float32 `[q, classes]`, the nearest weighing 1."""
    weights = np.exp((cosines - cosines[:, :1]) / temperature)
    votes = np.zeros((len(cosines), classes), dtype=np.float32)
    np.add.at(votes, (np.arange(len(cosines))[:, None], labels), weights)
    return votes


def _choose_k(
    task: Knn, bank: np.ndarray, labels: np.ndarray, classes: int, ks: Sequence[int], on_test: Sequence[float]
) -> tuple[int, Sequence[float]]:
    """The k that is reported, and what chose it: accuracy on training images that do not vote for themselves."""
    if task.select_on == "test":
        return ks[int(np.argmax(on_test))], on_test
    if len(ks) == 1:
        return ks[0], on_test
    rows = np.unique(np.linspace(0, len(bank) - 1, min(_CHOOSING, len(bank))).astype(int))
    cosines, found = knn_search(bank[rows], bank, min(max(ks) + 1, len(bank)))
    others = found != rows[:, None]
    others[others.all(1), -1] = False  # equal images: one of them stands for itself
    shape = (len(rows), found.shape[1] - 1)
    cosines, found = cosines[others].reshape(shape), found[others].reshape(shape)
    right = []
    for k in ks:
        votes = count_votes(cosines[:, :k], labels[found[:, :k]], classes, task.temperature)
        right.append(float((votes.argmax(1) == labels[rows]).mean()))
    return ks[int(np.argmax(right))], right


def _score_few(task: Knn, model: EvalModel, context: EvalContext, k: int, queries: np.ndarray) -> list[Score]:
    """Means over draws of few training images a class."""
    train, test, scores = context.corpus(task.train), context.corpus(task.test), []
    bank, labels, scorer = model.vectors(train), train.labels, context.scorer(task, model.name)
    classes = len(context.require_same_classes(task.train, task.test))
    for count in task.per_class:
        draws = []
        for draw in range(task.num_draws):
            rows = sample_per_class(labels, count, make_rng(context.settings.seed, "per class", count, draw))
            votes = predict(bank[rows], labels[rows], queries, classes, k, task.temperature)
            draws.append(votes.argmax(1) == test.labels)
        scores.append(scorer.score_draws(f"accuracy, {count} a class", draws, context.leaked.get(task.test)))
    return scores
