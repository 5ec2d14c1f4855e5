"""Multinomial logistic regression on frozen features, by scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from eval.context import EvalContext
from eval.eval_model import EvalModel
from eval.protocols.classification import sample_per_class, score_classification, validation_split
from eval.protocols.config import FewShot, Logistic
from eval.report.charts import scatter_with_trend
from eval.stats.rng import make_rng
from eval.stats.scores import ProtocolResult
from infra.corpus.corpus import Corpus


class Probe:
    """A fitted regression that knows all classes, those too that it was shown no image of."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, strength: float, task: Logistic) -> None:
        scaled = StandardScaler() if task.standardize else FunctionTransformer()
        self._model = make_pipeline(scaled, LogisticRegression(C=strength, max_iter=task.max_iterations, tol=1e-3))
        self._model.fit(features, labels)
        self._classes: np.ndarray = self._model.classes_

    def scores(self, features: np.ndarray, classes: int) -> np.ndarray:
        """Probability of each class, float32 `[n, classes]`."""
        found = np.zeros((len(features), classes), dtype=np.float32)
        found[:, self._classes] = self._model.predict_proba(features)
        return found


def logistic(task: Logistic, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Accuracy of the strength that a held-out part of the training set chooses, fitted again to all of it."""
    names = context.require_same_classes(task.train, task.test)
    classes = len(names)
    train, test = context.corpus(task.train), context.corpus(task.test)
    features, labels = model.features_of(train).raw(), train.labels
    curve = [1.0]
    if len(task.C) > 1:
        curve = _curve(
            task, features, labels, classes, model.features_of(test).raw(), test.labels, context.settings.seed
        )
    best = task.C[int(np.argmax(curve))]
    probe = Probe(features, labels, best, task)

    def classify(corpus: Corpus) -> np.ndarray:
        return probe.scores(model.features_of(corpus).raw(), classes)

    outcome = score_classification(task, model, context, names, classify)
    if len(curve) == 1 or model.name != "model" or not context.settings.pictures:
        return outcome
    picture = scatter_with_trend(task.C, curve, "C", "accuracy", log=True)
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
    if task.select_on == "validation":
        fit, choose = validation_split(labels, task.validation_fraction, seed)
        features, labels, test, truth = features[fit], labels[fit], features[choose], labels[choose]
    probes = (Probe(features, labels, strength, task) for strength in task.C)
    return [float((probe.scores(test, classes).argmax(1) == truth).mean()) for probe in probes]


def few_shot(task: FewShot, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Mean accuracy over draws of some images a class, the most images first."""
    names = context.require_same_classes(task.train, task.test)
    classes = len(names)
    train, test = context.corpus(task.train), context.corpus(task.test)
    bank, queries, scores = model.vectors(train), model.vectors(test), []
    for shots in sorted(task.shots, reverse=True):
        draws = []
        for draw in range(task.num_draws):
            rows = sample_per_class(train.labels, shots, make_rng(context.settings.seed, "few shot", shots, draw))
            probe = Probe(bank[rows], train.labels[rows], task.C, _UNSCALED)
            draws.append(probe.scores(queries, classes).argmax(1) == test.labels)
        scorer = context.scorer(task, model.name)
        scores.append(scorer.score_draws(f"accuracy, {shots} a class", draws, context.leaked.get(task.test)))
    return ProtocolResult(scores)


_UNSCALED = Logistic(standardize=False)
