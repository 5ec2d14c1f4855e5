"""The last blocks of a backbone and a linear layer trained together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.context import EvalContext
from eval.data.views import make_view
from eval.eval_model import EvalModel
from eval.protocols.classification import score_classification, validation_split
from eval.protocols.config import FineTune
from eval.stats.rng import make_rng
from eval.stats.scores import ProtocolResult
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from infra.progress import progress
from pretrain.backbones.base import Backbone, default_device
from pretrain.backbones.checkpoint_backbone import TimmCheckpointBackbone, VitCheckpointBackbone
from pretrain.backbones.timm_backbone import TimmBackbone
from pretrain.data.images import read_image


class FineTunedModel(nn.Module):
    """A copy of a backbone, frozen but for its last blocks and norm, and a linear layer on its vector."""

    def __init__(self, backbone: Backbone, blocks: int, width: int, classes: int) -> None:
        super().__init__()
        if isinstance(backbone, VitCheckpointBackbone):
            model: Any = copy.deepcopy(backbone.model)
            self._vectors: Callable[[Tensor], Tensor] = lambda batch: model([backbone.pixels(batch)])[0].class_token
        elif isinstance(backbone, TimmCheckpointBackbone) and hasattr(backbone.model.network, "blocks"):
            network = copy.deepcopy(backbone.model)
            model = network.network
            self._vectors = lambda batch: network([backbone.pixels(batch)])[0].class_token
        elif isinstance(backbone, TimmBackbone) and hasattr(backbone.model, "blocks"):
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

    def train(self, mode: bool = True) -> FineTunedModel:
        """What is frozen stays as it is in inference."""
        super().train(False)
        for module in self.trained:
            module.train(mode)
        return self


def fine_tune(task: FineTune, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Accuracy after training; a held-out part of the training set chooses the learning rate, or the test set."""
    names = context.require_same_classes(task.train, task.test)
    classes = len(names)
    train, test = context.corpus(task.train), context.corpus(task.test)
    seed, rate = context.settings.seed, task.learning_rates[0]
    if len(task.learning_rates) > 1:
        fit, choose = np.arange(len(train)), np.arange(len(test))
        judged = test
        if task.select_on == "validation":
            fit, choose = validation_split(train.labels, task.validation_fraction, seed)
            judged = train
        found = []
        for each in task.learning_rates:
            tuned = _train(task, model, train, fit, classes, each, seed)
            right = _logits(tuned, model, judged, choose).argmax(1) == judged.labels[choose]
            found.append(float(right.mean()))
        rate = task.learning_rates[int(np.argmax(found))]
    tuned = _train(task, model, train, np.arange(len(train)), classes, rate, seed)

    def classify(corpus: Corpus) -> np.ndarray:
        return _logits(tuned, model, corpus, np.arange(len(corpus)))

    return score_classification(task, model, context, names, classify)


def _train(
    task: FineTune, model: EvalModel, corpus: Corpus, rows: np.ndarray, classes: int, rate: float, seed: int
) -> FineTunedModel:
    torch.manual_seed(seed)
    tuned = (
        FineTunedModel(model.backbone, task.blocks, model.features_of(corpus).vector, classes)
        .to(default_device())
        .train()
    )
    parameters = [each for each in tuned.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=task.weight_decay)
    steps = max(task.epochs * len(rows) // task.batch, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with progress(f"fine-tuning {model.name}", steps) as advance:
        for step, batch in enumerate(_batches(rows, task.batch, steps, seed)):
            images = [_view(model, corpus, int(row), step + 1, seed) for row in batch]
            truth = torch.from_numpy(corpus.labels[batch]).to(default_device())
            optimizer.zero_grad()
            F.cross_entropy(tuned(torch.stack(images)), truth).backward()
            optimizer.step()
            schedule.step()
            advance()
    return tuned.eval()


def _batches(rows: np.ndarray, size: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    chance, order = make_rng(seed, "fine tuning"), np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < size:
            order = np.concatenate([order, chance.permutation(rows)])
        yield order[:size]
        order = order[size:]


def _view(model: EvalModel, corpus: Corpus, row: int, number: int, seed: int) -> Tensor:
    """A crop of an image; number 0 is its center."""
    return make_view(model.backbone, read_image(corpus, row), row, number, seed)


@torch.no_grad()
def _logits(tuned: FineTunedModel, model: EvalModel, corpus: Corpus, rows: np.ndarray) -> np.ndarray:
    found = []
    for start in range(0, len(rows), model.extraction.batch):
        images = [_view(model, corpus, int(row), 0, 0) for row in rows[start : start + model.extraction.batch]]
        found.append(tuned(torch.stack(images)).cpu().numpy())
    return np.concatenate(found)
