"""Linear probes on frozen features, a grid of them trained together (DINOv2, arXiv 2304.07193, section 7.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from eval.context import EvalContext
from eval.data.feature_store import FrozenFeatures
from eval.eval_model import EvalModel
from eval.protocols.classification import score_classification, validation_split
from eval.protocols.config import Linear
from eval.report.charts import plot_grid
from eval.stats.rng import make_rng
from eval.stats.scores import ProtocolResult
from infra.corpus.corpus import Corpus
from infra.progress import progress
from pretrain.backbones.base import default_device

_REFERENCE_BATCH = 256
_MOMENTUM = 0.9
_STD = 0.01
_SCORED = 4096  # rows at a time


@dataclass(frozen=True)
class ProbeHead:
    """Settings of one linear layer."""

    blocks: int
    pooled: bool
    learning_rate: float

    def __str__(self) -> str:
        last = f"last {self.blocks} blocks" if self.blocks > 1 else "last block"
        return f"{last}{', with patches' if self.pooled else ''}, lr {self.learning_rate:g}"


class ProbeHeads:
    """Linear layers of any settings on the same features, each with the gradient of its own loss alone."""

    def __init__(self, heads: Sequence[ProbeHead], features: FrozenFeatures, classes: int, seed: int) -> None:
        self.heads, self.device = list(heads), default_device()
        chance = torch.Generator().manual_seed(seed)
        self.groups: list[tuple[list[int], Tensor]] = []
        self.weights: list[Tensor] = []
        self.rates: list[Tensor] = []
        for blocks, pooled in dict.fromkeys((head.blocks, head.pooled) for head in self.heads):
            members = [i for i, head in enumerate(self.heads) if (head.blocks, head.pooled) == (blocks, pooled)]
            columns = torch.from_numpy(features.probe_columns(blocks, pooled)).to(self.device)
            # All members start alike, so that only their learning rates tell them apart. The last row is the bias.
            start = torch.zeros(len(columns) + 1, classes)
            start[:-1] = torch.randn(len(columns), classes, generator=chance) * _STD
            self.groups.append((members, columns))
            self.weights.append(start.to(self.device).repeat(len(members), 1, 1))
            self.rates.append(torch.tensor([self.heads[i].learning_rate for i in members], device=self.device))
        self._moved = [torch.zeros_like(each) for each in self.weights]

    def logits(self, rows: Tensor) -> list[Tensor]:
        """Of features `[b, width]` the logits `[members, b, classes]` of each group."""
        return [
            torch.einsum("bd,hdc->hbc", rows[:, columns], weights[:, :-1]) + weights[:, -1:]
            for (_, columns), weights in zip(self.groups, self.weights, strict=True)
        ]

    def step(self, rows: Tensor, labels: Tensor, factor: float) -> None:
        """One step of SGD with momentum, each head at its learning rate times `factor`."""
        for i, logits in enumerate(self.logits(rows)):
            (_, columns), weights = self.groups[i], self.weights[i]
            wrong = logits.softmax(-1)  # the gradient of cross-entropy: probabilities less the truth
            wrong[:, torch.arange(len(labels), device=labels.device), labels] -= 1
            wrong /= len(labels)
            gradient = torch.empty_like(weights)
            gradient[:, :-1] = torch.einsum("bd,hbc->hdc", rows[:, columns], wrong)
            gradient[:, -1] = wrong.sum(1)
            self._moved[i].mul_(_MOMENTUM).add_(gradient)
            weights -= factor * self.rates[i][:, None, None] * self._moved[i]

    def accuracies(self, features: FrozenFeatures, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Share of right answers of each head on some rows, float `[heads]`."""
        right = np.zeros(len(self.heads))
        for start in range(0, len(rows), _SCORED):
            some = torch.from_numpy(features.take(rows[start : start + _SCORED])).to(self.device)
            truth = torch.from_numpy(labels[start : start + _SCORED]).to(self.device)
            for (members, _), logits in zip(self.groups, self.logits(some), strict=True):
                right[members] += (logits.argmax(-1) == truth).sum(1).cpu().numpy()
        return right / len(rows)

    def scores(self, features: FrozenFeatures, head: int) -> np.ndarray:
        """Logits of one head for the centers of all images, float32 `[n, classes]`."""
        (group,) = (i for i, (members, _) in enumerate(self.groups) if head in members)
        place, found = self.groups[group][0].index(head), []
        for start in range(0, len(features), _SCORED * features.views):
            rows = np.arange(start, min(start + _SCORED * features.views, len(features)), features.views)
            some = torch.from_numpy(features.take(rows)).to(self.device)
            found.append(self.logits(some)[group][place].cpu().numpy())
        return np.concatenate(found)


def linear(task: Linear, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Accuracy of the head that a held-out part of the training set chooses, trained again on all of it; or, as
    published, of the head that is best on the test set."""
    names = context.require_same_classes(task.train, task.test)
    classes = len(names)
    train, test = context.corpus(task.train), context.corpus(task.test)
    features, labels = model.features_of(train, task.views), train.labels
    grid = _grid(task, features)
    seed = context.settings.seed
    if task.select_on == "test":
        heads = _train(task, grid, features, np.arange(len(train)), labels, classes, seed, model.name)
        tested = model.features_of(test)
        curve = heads.accuracies(tested, np.arange(len(tested)), test.labels)
        best = int(np.argmax(curve))
    else:
        fit, choose = validation_split(labels, task.validation_fraction, seed)
        tried = _train(task, grid, features, fit, labels, classes, seed, model.name)
        curve = tried.accuracies(features, choose * task.views, labels[choose])
        chosen = grid[int(np.argmax(curve))]
        heads = _train(task, [chosen], features, np.arange(len(train)), labels, classes, seed, model.name)
        best = 0

    def classify(corpus: Corpus) -> np.ndarray:
        return heads.scores(model.features_of(corpus), best)

    outcome = score_classification(task, model, context, names, classify)
    first, pictures = outcome.scores[0], dict(outcome.pictures)
    note = ", ".join(filter(None, [str(grid[int(np.argmax(curve))]), first.note]))
    if model.name == "model" and context.settings.pictures and len(grid) > 1:
        pictures["curve"] = plot_grid([(str(h).rpartition(", lr")[0], h.learning_rate) for h in grid], curve.tolist())
    return replace(outcome, scores=[replace(first, note=note), *outcome.scores[1:]], pictures=pictures)


def _grid(task: Linear, features: FrozenFeatures) -> list[ProbeHead]:
    """All heads; of a backbone without tokens only those that differ on its vector."""
    if not features.blocks:
        return [ProbeHead(1, False, rate) for rate in task.learning_rates]
    blocks = sorted({min(each, len(features.blocks)) for each in task.blocks})
    return [ProbeHead(*each) for each in product(blocks, sorted(set(task.average_pool)), task.learning_rates)]


def _train(
    task: Linear,
    grid: Sequence[ProbeHead],
    features: FrozenFeatures,
    images: np.ndarray,
    labels: np.ndarray,
    classes: int,
    seed: int,
    title: str,
) -> ProbeHeads:
    """Heads after all epochs over all views of some images; learning rates fall to 0 along a cosine."""
    scale = task.batch / _REFERENCE_BATCH
    heads = ProbeHeads(
        [replace(each, learning_rate=each.learning_rate * scale) for each in grid], features, classes, seed
    )
    rows = (images[:, None] * task.views + np.arange(task.views)).ravel()
    steps = max(task.epochs * len(images) // task.batch, task.min_steps)
    chance, order = make_rng(seed, "linear"), np.empty(0, dtype=np.int64)
    with progress(f"linear probes of {title}", steps) as advance, torch.inference_mode():
        for step in range(steps):
            while len(order) < task.batch:
                order = np.concatenate([order, chance.permutation(rows)])
            batch, order = order[: task.batch], order[task.batch :]
            some = torch.from_numpy(features.take(batch)).to(heads.device)
            truth = torch.from_numpy(labels[batch // task.views]).to(heads.device)
            heads.step(some, truth, 0.5 * (1 + np.cos(np.pi * step / steps)))
            advance()
    return heads
