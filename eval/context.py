"""The datasets of an evaluation, opened, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from eval.config import EvaluateConfig
from eval.data.leaks import describe_leak_check
from eval.protocols.config import Task
from eval.stats.scores import Scorer
from infra.artifacts.manifest import ArtifactRef
from infra.corpus.corpus import Corpus
from infra.corpus.selection import Selection
from infra.errors import UserError
from pretrain.data.images import decodable_rows


@dataclass(frozen=True)
class EvalContext:
    """Datasets by name."""

    corpora: Mapping[str, Corpus]
    leaked: Mapping[str, np.ndarray]
    """For some of them, bool `[n]`: images that were seen in training, or near-duplicates of such"""
    settings: EvaluateConfig
    inputs: Mapping[str, ArtifactRef]
    leak_checks: Mapping[str, str] = field(default_factory=dict)
    """By dataset, what was looked for in words"""

    @classmethod
    def open(cls, config: EvaluateConfig) -> EvalContext:
        """Open what the tasks read.

        Raises:
            UserError: something is missing.
        """
        wanted = config.needed()
        corpora = {name: decodable_rows(Corpus.open(config.datasets[name])) for name in sorted(wanted)}
        inputs = {f"dataset_{name}": corpus.artifact.as_ref() for name, corpus in corpora.items()}
        leaked, checks = {}, {}
        for name in sorted(wanted & set(config.leaks)):
            selection = Selection.open(config.leaks[name])
            whole, rows = Corpus.from_artifact(corpora[name].artifact), corpora[name].rows
            selection.require_keys(whole.table["key"], f"datasets.{name}")
            leaked[name] = ~selection.ledger["keep"].to_numpy()[slice(None) if rows is None else rows]
            inputs[f"leaks_{name}"] = selection.artifact.as_ref()
            checks[name] = describe_leak_check(selection.artifact)
        return cls(corpora, leaked, config, inputs, checks)

    def corpus(self, name: str) -> Corpus:
        return self.corpora[name]

    def scorer(self, task: Task, model: str) -> Scorer:
        """What makes a task's scores of a backbone."""
        return Scorer(task.protocol, model, self.settings.bootstrap, self.settings.seed)

    def labels_of(self, name: str) -> np.ndarray:
        """Class of each image, int64 `[n]`."""
        return self.corpora[name].labels

    def require_same_classes(self, train: str, test: str) -> list[str]:
        """Names of the classes that two datasets share; numbers where they have none.

        Raises:
            UserError: they have not the same, or only one.
        """
        first, second = self.corpora[train], self.corpora[test]
        for name in (train, test):
            self._require_labels(name)
        if first.classes != second.classes:
            raise UserError(f"datasets: {self._describe_class_difference(train, test)}; ingest both the same way")
        if len(np.unique(first.labels)) < 2:
            raise UserError(f"datasets: {train} has one class only; a probe needs two or more")
        return max(self.class_names(train), self.class_names(test), key=len)

    def _require_labels(self, name: str) -> None:
        """Check that every image of a dataset has a label.

        Raises:
            UserError: some have none.
        """
        corpus = self.corpora[name]
        without = int(corpus.table["label"].null_count)
        if not len(corpus):
            raise UserError(f"datasets: {name} has no images; give one that has")
        if without:
            some = "no labels" if without == len(corpus) else f"{without} of {len(corpus)} images without a label"
            raise UserError(f"datasets: {name} has {some}; give class folders, or shards with .cls members")

    def _describe_class_difference(self, train: str, test: str) -> str:
        """In words a class that one of two datasets has and the other lacks."""
        first, second = self.corpora[train].classes, self.corpora[test].classes
        for name, classes, other, others in ((train, first, test, second), (test, second, train, first)):
            lacking = sorted(set(classes) - set(others))
            if lacking and not others:
                return f"{name} has named classes such as {lacking[0]}, and {other} numbers"
            if lacking:
                more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
                return f"{other} lacks the class {lacking[0]}{more} of {name}"
        return f"{test} and {train} have the same classes in another order"

    def class_names(self, name: str) -> list[str]:
        """Of each class a name; its number where it has none."""
        corpus = self.corpora[name]
        return corpus.classes or [str(number) for number in range(int(corpus.labels.max(initial=0)) + 1)]
