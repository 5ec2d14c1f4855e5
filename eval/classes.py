"""Answers of classifiers on the set they were made for, and on others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from eval.bench import Bench
from eval.chance import generator
from eval.charts import confusion
from eval.scores import Outcome, Score, Scorer
from eval.subject import Subject
from eval.tasks.config import Classification, Learned, OtherSet
from eval.truth import read_names
from infra.corpora import Corpus
from infra.errors import UserError

Classify = Callable[[Corpus], np.ndarray]
"""Of each image how much speaks for each class, float32 `[n, classes]`."""
_MOST_CLASSES = 60  # of a confusion matrix that can be read


def classified(
    task: Classification, subject: Subject, bench: Bench, names: list[str], classify: Classify, metric: str = "accuracy"
) -> Outcome:
    """Score a classifier on its test set and on the others that the task names.

    Args:
        names: of the classes that it knows.
        metric: what the share of right answers is called.
    """
    scorer, labels = bench.scorer(task, subject.name), bench.labels(task.test)
    found = classify(bench.corpus(task.test)).argmax(1)
    right = found == labels
    chosen_here = isinstance(task, Learned) and task.select == "published" and task.candidates() > 1
    note = "settings chosen on this test set" if chosen_here else ""
    chance = 1 / len(names)
    scores = [scorer.accuracy(metric, right, bench.leaked.get(task.test), note, chance)]
    for other in task.also:
        if other.dataset in bench.corpora:
            scores.append(_on(other, scorer, bench, names, classify))
    pictures = {}
    if bench.settings.pictures and subject.name == "model" and 2 <= len(names) <= _MOST_CLASSES:
        pictures["confusion"] = confusion(labels, found, names)
    return Outcome(scores, pictures, right)


def _on(other: OtherSet, scorer: Scorer, bench: Bench, names: list[str], classify: Classify) -> Score:
    """Accuracy on another set: an answer is right when it is one of the classes that the image's class stands for."""
    meaning = _meaning(other, bench, names)  # [classes of the other set, classes]
    labels = bench.labels(other.dataset)
    scored: np.ndarray = np.asarray(meaning.any(1))[labels]
    if not scored.any():
        raise UserError(f"datasets: {other.dataset} shows none of the classes that are known; give a class map")
    found = classify(bench.corpus(other.dataset))
    if other.restrict:
        found = np.where(meaning.any(0), found, -np.inf)
    correct = meaning[labels, found.argmax(1)][scored]
    leaked = bench.leaked.get(other.dataset)
    return scorer.accuracy(f"accuracy on {other.dataset}", correct, None if leaked is None else leaked[scored])


def _meaning(other: OtherSet, bench: Bench, names: list[str]) -> np.ndarray:
    """Which of the known classes each class of another set is, bool `[theirs, known]`."""
    theirs = bench.class_names(other.dataset)
    given: Any = read_names(other.classes) if other.classes is not None else {name: name for name in names}
    if other.classes is not None and (unknown := sorted(set(given) - set(theirs))):
        raise UserError(f"{other.classes}: {unknown[0]} is no class of {other.dataset}; mend the map")
    place = {name: number for number, name in enumerate(names)}
    meaning = np.zeros((len(theirs), len(names)), dtype=bool)
    for row, name in enumerate(theirs):
        for each in _listed(given.get(name, [])):
            if each not in place:
                raise UserError(f"{other.classes}: {name}: {each} is no class of the training set; mend the map")
            meaning[row, place[each]] = True
    return meaning


def _listed(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def spoken_names(file: str | None, bench: Bench, dataset: str) -> list[str]:
    """Classes as one would say them.

    Raises:
        UserError: the file lacks one.
    """
    own = bench.class_names(dataset)
    if file is None and not bench.corpus(dataset).classes:
        raise UserError(f"datasets: the classes of {dataset} have no names; give them in a file, as the task's `names`")
    if file is None:
        return [name.replace("_", " ") for name in own]
    given = read_names(file)
    if isinstance(given, list):
        if len(given) != len(own):
            raise UserError(f"{file}: has {len(given)} names, but {dataset} has {len(own)} classes; mend the list")
        return [str(each) for each in given]
    if missing := [name for name in own if name not in given]:
        raise UserError(f"{file}: has no name for the class {missing[0]}; add it")
    return [str(given[name]) for name in own]


def held_out(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and rows that choose settings, int64: of each class its share chooses, but never all of it.

    Raises:
        UserError: every class has one image.
    """
    chance, choose = generator(seed, "held out"), []
    for each in np.unique(labels):
        rows = chance.permutation(np.flatnonzero(labels == each))
        wanted = len(rows) * share
        count = int(wanted) + int(chance.random() < wanted % 1)  # in small classes by chance, so that shares hold
        choose.append(rows[: min(count, len(rows) - 1)])
    chosen = np.sort(np.concatenate(choose))
    if not len(chosen):
        several = [rows for each in np.unique(labels) if len(rows := np.flatnonzero(labels == each)) > 1]
        if not several:
            raise UserError("one image a class is too little to choose settings by; give one setting alone")
        chosen = several[0][-1:]
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def per_class(labels: np.ndarray, count: int, chance: np.random.Generator) -> np.ndarray:
    """Rows of `count` images of each class, or all of a class that has fewer, int64 in order."""
    chosen = [chance.permutation(np.flatnonzero(labels == each))[:count] for each in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
