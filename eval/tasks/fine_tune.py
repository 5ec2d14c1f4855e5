"""The last blocks of a backbone and a linear layer trained together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.bench import Bench
from eval.chance import generator
from eval.classes import classified, held_out
from eval.scores import Outcome
from eval.subject import Subject
from eval.tasks.config import FineTune
from eval.views import view
from infra.corpora import Corpus
from infra.errors import UserError
from infra.progress import progress
from pretrain.backbones import Backbone, CheckpointedNetwork, CheckpointedViT, default_device
from pretrain.data.images import read_image
from pretrain.foreign import Timm


class Tuned(nn.Module):
    """A copy of a backbone, frozen but for its last blocks and norm, and a linear layer on its vector."""

    def __init__(self, backbone: Backbone, blocks: int, width: int, classes: int) -> None:
        super().__init__()
        if isinstance(backbone, CheckpointedViT):
            model: Any = copy.deepcopy(backbone.model)
            self._vectors: Callable[[Tensor], Tensor] = lambda batch: model([backbone.pixels(batch)])[0].class_token
        elif isinstance(backbone, CheckpointedNetwork) and hasattr(backbone.model.network, "blocks"):
            network = copy.deepcopy(backbone.model)
            model = network.network
            self._vectors = lambda batch: network([backbone.pixels(batch)])[0].class_token
        elif isinstance(backbone, Timm) and hasattr(backbone.model, "blocks"):
            model = copy.deepcopy(backbone.model)
            self._vectors = lambda batch: model(batch.to(default_device()))
        else:
            raise UserError("fine_tune: takes checkpoints of Fovea or the official code, and ViTs of timm")
        self.model = model.requires_grad_(False)
        last = list(model.blocks)[max(len(model.blocks) - blocks, 0) :]
        self.trained = [*last, *([model.norm] if blocks else [])]
        for module in self.trained:
            module.requires_grad_(True)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Tensor) -> Tensor:
        """Logits of preprocessed images, `[n, classes]`."""
        return self.head(self._vectors(batch).float())

    def train(self, mode: bool = True) -> Tuned:
        """What is frozen stays as it is in inference."""
        super().train(False)
        for module in self.trained:
            module.train(mode)
        return self


def fine_tune(task: FineTune, subject: Subject, bench: Bench) -> Outcome:
    """Accuracy after training; a held-out part of the training set chooses the learning rate, or the test set."""
    names = bench.same_classes(task.train, task.test)
    classes = len(names)
    train, test = bench.corpus(task.train), bench.corpus(task.test)
    seed, rate = bench.settings.seed, task.learning_rates[0]
    if len(task.learning_rates) > 1:
        fit, choose = np.arange(len(train)), np.arange(len(test))
        judged = test
        if task.select == "held_out":
            fit, choose = held_out(train.labels, task.held_out, seed)
            judged = train
        found = []
        for each in task.learning_rates:
            tuned = _trained(task, subject, train, fit, classes, each, seed)
            right = _logits(tuned, subject, judged, choose).argmax(1) == judged.labels[choose]
            found.append(float(right.mean()))
        rate = task.learning_rates[int(np.argmax(found))]
    tuned = _trained(task, subject, train, np.arange(len(train)), classes, rate, seed)

    def classify(corpus: Corpus) -> np.ndarray:
        return _logits(tuned, subject, corpus, np.arange(len(corpus)))

    return classified(task, subject, bench, names, classify)


def _trained(
    task: FineTune, subject: Subject, corpus: Corpus, rows: np.ndarray, classes: int, rate: float, seed: int
) -> Tuned:
    torch.manual_seed(seed)
    tuned = Tuned(subject.backbone, task.blocks, subject.frozen(corpus).vector, classes).to(default_device()).train()
    parameters = [each for each in tuned.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=task.weight_decay)
    steps = max(task.epochs * len(rows) // task.batch, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with progress(f"fine-tuning {subject.name}", steps) as advance:
        for step, batch in enumerate(_batches(rows, task.batch, steps, seed)):
            images = [_view(subject, corpus, int(row), step + 1, seed) for row in batch]
            truth = torch.from_numpy(corpus.labels[batch]).to(default_device())
            optimiser.zero_grad()
            F.cross_entropy(tuned(torch.stack(images)), truth).backward()
            optimiser.step()
            schedule.step()
            advance()
    return tuned.eval()


def _batches(rows: np.ndarray, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    chance, order = generator(seed, "fine tuning"), np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < size:
            order = np.concatenate([order, chance.permutation(rows)])
        yield order[:size]
        order = order[size:]


def _view(subject: Subject, corpus: Corpus, row: int, number: int, seed: int) -> Tensor:
    """A crop of an image; number 0 is its centre."""
    return view(subject.backbone, read_image(corpus, row), row, number, seed)


@torch.no_grad()
def _logits(tuned: Tuned, subject: Subject, corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    found = []
    for start in range(0, len(rows), subject.how.batch):
        images = [_view(subject, corpus, int(row), 0, 0) for row in rows[start : start + subject.how.batch]]
        found.append(tuned(torch.stack(images)).cpu().numpy())
    return np.concatenate(found)
