"""Answers of classifiers on the set they were made for, and on others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from eval.context import EvalContext
from eval.data.annotations import read_class_names
from eval.eval_model import EvalModel
from eval.protocols.config import ClassificationTask, LearnedTask, OodDataset
from eval.report.charts import plot_confusion
from eval.stats.rng import make_rng
from eval.stats.scores import ProtocolResult, Score, Scorer
from infra.corpus.corpus import Corpus
from infra.errors import UserError

ClassifyFn = Callable[[Corpus], np.ndarray]
"""Of each image how much speaks for each class, float32 `[n, classes]`."""
_MOST_CLASSES = 60  # of a confusion matrix that can be read


def score_classification(
    task: ClassificationTask,
    model: EvalModel,
    context: EvalContext,
    names: list[str],
    classify: ClassifyFn,
    metric: str = "accuracy",
) -> ProtocolResult:
    """Score a classifier on its test set and on the others that the task names.

    Args:
        names: of the classes that it knows.
        metric: what the share of right answers is called.
    """
    scorer, labels = context.scorer(task, model.name), context.labels_of(task.test)
    found = classify(context.corpus(task.test)).argmax(1)
    right = found == labels
    chosen_here = isinstance(task, LearnedTask) and task.select_on == "test" and task.num_candidates() > 1
    note = "settings chosen on this test set" if chosen_here else ""
    chance = 1 / len(names)
    scores = [scorer.score_accuracy(metric, right, context.leaked.get(task.test), note, chance)]
    for other in task.ood_datasets:
        if other.dataset in context.corpora:
            scores.append(_score_ood(other, scorer, context, names, classify))
    pictures = {}
    if context.settings.pictures and model.name == "model" and 2 <= len(names) <= _MOST_CLASSES:
        pictures["confusion"] = plot_confusion(labels, found, names)
    return ProtocolResult(scores, pictures, right)


def _score_ood(
    other: OodDataset, scorer: Scorer, context: EvalContext, names: list[str], classify: ClassifyFn
) -> Score:
    """Accuracy on another set: an answer is right when it is one of the classes that the image's class stands for."""
    meaning = _read_class_map(other, context, names)  # [classes of the other set, classes]
    labels = context.labels_of(other.dataset)
    scored: np.ndarray = np.asarray(meaning.any(1))[labels]
    if not scored.any():
        raise UserError(f"datasets: {other.dataset} contains none of the known classes; give a class map")
    found = classify(context.corpus(other.dataset))
    if other.restrict:
        found = np.where(meaning.any(0), found, -np.inf)
    correct = meaning[labels, found.argmax(1)][scored]
    leaked = context.leaked.get(other.dataset)
    return scorer.score_accuracy(f"accuracy on {other.dataset}", correct, None if leaked is None else leaked[scored])


def _read_class_map(other: OodDataset, context: EvalContext, names: list[str]) -> np.ndarray:
    """Which of the known classes each class of another set is, bool `[theirs, known]`."""
    theirs = context.class_names(other.dataset)
    given: Any = read_class_names(other.classes) if other.classes is not None else {name: name for name in names}
    if other.classes is not None and (unknown := sorted(set(given) - set(theirs))):
        raise UserError(f"{other.classes}: {unknown[0]} is no class of {other.dataset}; fix the map")
    place = {name: number for number, name in enumerate(names)}
    meaning = np.zeros((len(theirs), len(names)), dtype=bool)
    for row, name in enumerate(theirs):
        for each in _as_list(given.get(name, [])):
            if each not in place:
                raise UserError(f"{other.classes}: {name}: {each} is no class of the training set; fix the map")
            meaning[row, place[each]] = True
    return meaning


def _as_list(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def spoken_names(file: str | None, context: EvalContext, dataset: str) -> list[str]:
    """Classes as one would say them.

    Raises:
        UserError: the file lacks one.
    """
    own = context.class_names(dataset)
    if file is None and not context.corpus(dataset).classes:
        raise UserError(
            f"datasets: the classes of {dataset} have no names; give them in a file, as the task's `class_names`"
        )
    if file is None:
        return [name.replace("_", " ") for name in own]
    given = read_class_names(file)
    if isinstance(given, list):
        if len(given) != len(own):
            raise UserError(f"{file}: has {len(given)} names, but {dataset} has {len(own)} classes; fix the list")
        return [str(each) for each in given]
    if missing := [name for name in own if name not in given]:
        raise UserError(f"{file}: has no name for the class {missing[0]}; add it")
    return [str(given[name]) for name in own]


def validation_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and rows that choose settings, int64: of each class its share chooses, but never all of it.

    Raises:
        UserError: every class has one image.
    """
    chance, choose = make_rng(seed, "held out"), []
    for each in np.unique(labels):
        rows = chance.permutation(np.flatnonzero(labels == each))
        wanted = len(rows) * fraction
        count = int(wanted) + int(chance.random() < wanted % 1)  # in small classes by chance, so that shares hold
        choose.append(rows[: min(count, len(rows) - 1)])
    chosen = np.sort(np.concatenate(choose))
    if not len(chosen):
        several = [rows for each in np.unique(labels) if len(rows := np.flatnonzero(labels == each)) > 1]
        if not several:
            raise UserError("one image a class is too little to choose settings by; give one setting alone")
        chosen = several[0][-1:]
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def sample_per_class(labels: np.ndarray, count: int, chance: np.random.Generator) -> np.ndarray:
    """Rows of `count` images of each class, or all of a class that has fewer, int64 in order."""
    chosen = [chance.permutation(np.flatnonzero(labels == each))[:count] for each in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
