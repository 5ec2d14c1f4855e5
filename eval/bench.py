"""The datasets of an evaluation, opened, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from eval.config import EvaluateConfig
from eval.scores import Scorer
from eval.tasks.config import Task
from infra.artifacts import Input
from infra.corpora import Corpus
from infra.errors import UserError
from infra.selections import Selection


@dataclass(frozen=True)
class Bench:
    """Datasets by name."""

    corpora: Mapping[str, Corpus]
    leaked: Mapping[str, np.ndarray]
    """For some of them, bool `[n]`: images that were seen in training, or near-duplicates of such"""
    settings: EvaluateConfig
    inputs: Mapping[str, Input]

    @classmethod
    def open(cls, config: EvaluateConfig) -> Bench:
        """Open what the tasks read.

        Raises:
            UserError: something is missing.
        """
        wanted = config.needed()
        corpora = {name: Corpus.open(config.datasets[name]) for name in sorted(wanted)}
        inputs = {f"dataset_{name}": corpus.artifact.as_input() for name, corpus in corpora.items()}
        leaked = {}
        for name in sorted(wanted & set(config.leaks)):
            selection = Selection.open(config.leaks[name])
            selection.require_keys(corpora[name].table["key"], f"datasets.{name}")
            leaked[name] = ~selection.ledger["keep"].to_numpy()
            inputs[f"leaks_{name}"] = selection.artifact.as_input()
        return cls(corpora, leaked, config, inputs)

    def corpus(self, name: str) -> Corpus:
        return self.corpora[name]

    def scorer(self, task: Task, subject: str) -> Scorer:
        """What makes a task's scores of a backbone."""
        return Scorer(task.protocol, subject, self.settings.bootstrap, self.settings.seed)

    def labels(self, name: str) -> np.ndarray:
        """Class of each image, int64 `[n]`."""
        return self.corpora[name].labels

    def same_classes(self, train: str, test: str) -> list[str]:
        """Names of the classes that two datasets share; numbers where they have none.

        Raises:
            UserError: they have not the same, or only one.
        """
        first, second = self.corpora[train], self.corpora[test]
        if first.classes != second.classes:
            raise UserError(f"datasets: {test} has other classes than {train}; ingest both the same way")
        if not len(first) or not len(second):
            raise UserError(f"datasets: {train if not len(first) else test} has no images; give one that has")
        if len(np.unique(first.labels)) < 2:
            raise UserError(f"datasets: {train} has one class only; a probe needs two or more")
        return max(self.class_names(train), self.class_names(test), key=len)

    def class_names(self, name: str) -> list[str]:
        """Of each class a name; its number where it has none."""
        corpus = self.corpora[name]
        return corpus.classes or [str(number) for number in range(int(corpus.labels.max(initial=0)) + 1)]
