"""Multinomial logistic regression on frozen features, by scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from eval.bench import Bench
from eval.chance import generator
from eval.charts import along
from eval.classes import classified, held_out, per_class
from eval.scores import Outcome
from eval.subject import Subject
from eval.tasks.config import FewShot, Logistic
from infra.corpora import Corpus


class Probe:
    """A fitted regression that knows all classes, those too that it was shown no image of."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, strength: float, task: Logistic) -> None:
        scaled = StandardScaler() if task.standardise else FunctionTransformer()
        self._model = make_pipeline(scaled, LogisticRegression(C=strength, max_iter=task.iterations, tol=1e-3))
        self._model.fit(features, labels)
        self._classes: np.ndarray = self._model.classes_

    def scores(self, features: np.ndarray, classes: int) -> np.ndarray:
        """Probability of each class, float32 `[n, classes]`."""
        found = np.zeros((len(features), classes), dtype=np.float32)
        found[:, self._classes] = self._model.predict_proba(features)
        return found


def logistic(task: Logistic, subject: Subject, bench: Bench) -> Outcome:
    """Accuracy of the strength that a held-out part of the training set chooses, fitted again to all of it."""
    names = bench.same_classes(task.train, task.test)
    classes = len(names)
    train, test = bench.corpus(task.train), bench.corpus(task.test)
    features, labels = subject.frozen(train).raw(), train.labels
    curve = [1.0]
    if len(task.strengths) > 1:
        curve = _curve(task, features, labels, classes, subject.frozen(test).raw(), test.labels, bench.settings.seed)
    best = task.strengths[int(np.argmax(curve))]
    probe = Probe(features, labels, best, task)

    def classify(corpus: Corpus) -> np.ndarray:
        return probe.scores(subject.frozen(corpus).raw(), classes)

    outcome = classified(task, subject, bench, names, classify)
    if len(curve) == 1 or subject.name != "model" or not bench.settings.pictures:
        return outcome
    picture = along(task.strengths, curve, "C", "accuracy", log=True)
    return replace(outcome, pictures=outcome.pictures | {"curve": picture})


def _curve(
    task: Logistic,
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    test: np.ndarray,
    truth: np.ndarray,
    seed: int,
) -> list[float]:
    """Accuracy of each strength on what chooses."""
    if task.select == "held_out":
        fit, choose = held_out(labels, task.held_out, seed)
        features, labels, test, truth = features[fit], labels[fit], features[choose], labels[choose]
    probes = (Probe(features, labels, strength, task) for strength in task.strengths)
    return [float((probe.scores(test, classes).argmax(1) == truth).mean()) for probe in probes]


def few_shot(task: FewShot, subject: Subject, bench: Bench) -> Outcome:
    """Mean accuracy over draws of some images a class, the most images first."""
    names = bench.same_classes(task.train, task.test)
    classes = len(names)
    train, test = bench.corpus(task.train), bench.corpus(task.test)
    bank, queries, scores = subject.vectors(train), subject.vectors(test), []
    for shots in sorted(task.shots, reverse=True):
        draws = []
        for draw in range(task.draws):
            rows = per_class(train.labels, shots, generator(bench.settings.seed, "few shot", shots, draw))
            probe = Probe(bank[rows], train.labels[rows], task.strength, _UNSCALED)
            draws.append(probe.scores(queries, classes).argmax(1) == test.labels)
        scorer = bench.scorer(task, subject.name)
        scores.append(scorer.over_draws(f"accuracy, {shots} a class", draws, bench.leaked.get(task.test)))
    return Outcome(scores)


_UNSCALED = Logistic(standardise=False)
