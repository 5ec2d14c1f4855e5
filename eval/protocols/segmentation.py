"""Segmentation from patch tokens: by one linear layer, and by the votes of the most similar patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from eval.context import EvalContext
from eval.data import dense_labels
from eval.data.patch_tokens import PatchTokenGrids
from eval.eval_model import EvalModel
from eval.protocols.classification import validation_split
from eval.protocols.config import KnnSegmentation, Segmentation, SegmentationSettings
from eval.protocols.knn import count_votes
from eval.report.pictures.masks import mask_sheet
from eval.stats.rng import make_rng
from eval.stats.scores import ProtocolResult
from infra.compute.sharded_array import l2_normalize
from infra.compute.vector_search import knn_search
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from infra.progress import progress
from pretrain.backbones.base import default_device

Judge = Callable[[np.ndarray], Tensor]
"""Of tokens, float32 `[patches, dim]`, how much speaks for each class, `[patches, classes]`."""


def segmentation(task: Segmentation, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """mIoU of a linear layer whose learning rate a held-out part of the training images chooses."""
    train, classes = context.corpus(task.train), _classes(task, context)
    tokens = dense_labels.extract_grids(model, train, task.grid, task.kind)
    shares = _shares(task, model, train, classes, tokens)
    layers = _Layers(task, tokens, shares, context.settings.seed)
    everything, best = np.arange(len(train)), 0
    if len(task.learning_rates) > 1:
        fit, choose = validation_split(np.zeros(len(train), dtype=int), task.validation_fraction, context.settings.seed)
        tried = layers.trained(task.learning_rates, fit, f"segmentation of {model.name}, tried")
        best = int(np.argmin([layers.loss(each, choose) for each in tried]))
    (layer,) = layers.trained(task.learning_rates[best : best + 1], everything, f"segmentation of {model.name}")
    return _scored(task, model, context, classes, lambda rows: layers.logits(layer, rows))


def knn_segmentation(task: KnnSegmentation, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """mIoU of the votes of similar patches; a patch of the bank votes for the class it shows most of."""
    train, classes = context.corpus(task.train), _classes(task, context)
    tokens = dense_labels.extract_grids(model, train, task.grid, task.kind)
    side = dense_labels.side_for(model.token_backbone(task.kind), task.grid)
    largest = _largest(task, train, classes, tokens, side)
    places = make_rng(context.settings.seed, "bank").permutation(np.flatnonzero(largest >= 0))
    places = np.sort(places[: task.bank_size])
    if not len(places):
        raise UserError(f"datasets: {task.train} has no patch with a known class; check its masks and `ignore`")
    per_image = tokens.shape[0] * tokens.shape[1]
    bank = l2_normalize(
        np.concatenate([tokens.flat(np.array([i]))[_within(places, i, per_image)] for i in range(len(train))])
    )
    labels = largest[places]
    k = min(task.k, len(bank))

    def judge(rows: np.ndarray) -> Tensor:
        cosines, found = knn_search(l2_normalize(rows), bank, k)
        votes = count_votes(cosines, labels[found], len(classes), task.temperature)
        return torch.from_numpy(votes / votes.sum(1, keepdims=True))

    return _scored(task, model, context, classes, judge)


def _within(places: np.ndarray, image: int, per_image: int) -> np.ndarray:
    """Of places among all patches those of one image, counted within it."""
    low, high = np.searchsorted(places, [image * per_image, (image + 1) * per_image])
    return places[low:high] - image * per_image


def _classes(task: SegmentationSettings, context: EvalContext) -> np.ndarray:
    """Numbers in the masks, int64, ascending, without the ignored; also those that only the test set has."""
    found: set[int] = set()
    for corpus in {id(each): each for each in (context.corpus(task.train), context.corpus(task.test))}.values():
        for row in range(len(corpus)):
            found |= set(np.unique(dense_labels.read_map(corpus, row, task.annotation_suffix)).tolist())
    if not found - set(task.ignore):
        raise UserError(
            f"datasets: {task.train} has masks of ignored numbers only; check `annotation_suffix` and `ignore`"
        )
    return np.array(sorted(found - set(task.ignore)), dtype=np.int64)


def _shares(
    task: SegmentationSettings, model: EvalModel, train: Corpus, classes: np.ndarray, tokens: PatchTokenGrids
) -> np.ndarray:
    """Of every patch of every image the share of each class, float16 `[n, h * w, classes]`, on disk."""
    side = dense_labels.side_for(model.token_backbone(task.protocol), task.grid)
    found = model.allocate_scratch((len(train), tokens.shape[0] * tokens.shape[1], len(classes)))
    for row in range(len(train)):
        found[row] = dense_labels.patch_class_fractions(
            dense_labels.read_map(train, row, task.annotation_suffix), classes, tokens.shape, side
        )
    return found


def _largest(
    task: SegmentationSettings, train: Corpus, classes: np.ndarray, tokens: PatchTokenGrids, side: int
) -> np.ndarray:
    """Of every patch of every image the class that it shows most of, int64 `[n * h * w]`; -1 where half is unknown."""
    found = []
    for row in range(len(train)):
        shares = dense_labels.patch_class_fractions(
            dense_labels.read_map(train, row, task.annotation_suffix), classes, tokens.shape, side
        )
        found.append(np.where(shares.sum(1) > 0.5, shares.argmax(1), -1))
    return np.concatenate(found)


class _Layers:
    """Linear layers on standardized patch tokens, trained by cross-entropy with the shares of classes in a patch."""

    def __init__(self, task: Segmentation, tokens: PatchTokenGrids, shares: np.ndarray, seed: int) -> None:
        self.task, self.tokens, self.shares, self.seed = task, tokens, shares, seed
        self.device = default_device()
        some = tokens.flat(np.unique(np.linspace(0, len(tokens.tokens) - 1, 256).astype(int)))
        self.mean, self.std = (torch.from_numpy(each).to(self.device) for each in (some.mean(0), some.std(0) + 1e-6))

    def trained(self, rates: Sequence[float], images: np.ndarray, title: str) -> list[torch.nn.Linear]:
        """One layer for each learning rate, all on the same batches."""
        torch.manual_seed(self.seed)
        width, classes = self.tokens.tokens.shape[-1], self.shares.shape[2]
        layers = [torch.nn.Linear(width, classes).to(self.device) for _ in rates]
        groups = [{"params": each.parameters(), "lr": rate} for each, rate in zip(layers, rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.task.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.task.steps)
        chance = make_rng(self.seed, "segmentation")
        with progress(title, self.task.steps) as advance:
            for _ in range(self.task.steps):
                batch = chance.choice(images, min(self.task.batch, len(images)), replace=False)
                optimizer.zero_grad()
                sum((self._loss(layer, batch) for layer in layers), torch.zeros((), device=self.device)).backward()
                optimizer.step()
                schedule.step()
                advance()
        return layers

    def _loss(self, layer: torch.nn.Linear, images: np.ndarray) -> Tensor:
        truth = torch.from_numpy(self.shares[images].astype(np.float32)).flatten(0, 1).to(self.device)
        logits = layer(self._standardized(self.tokens.flat(images)))
        return -(truth * logits.log_softmax(-1)).sum() / truth.sum().clamp_min(1)

    @torch.no_grad()
    def loss(self, layer: torch.nn.Linear, images: np.ndarray) -> float:
        """Mean over images of a layer's loss."""
        return float(np.mean([float(self._loss(layer, images[i : i + 1])) for i in range(len(images))]))

    @torch.no_grad()
    def logits(self, layer: torch.nn.Linear, rows: np.ndarray) -> Tensor:
        return layer(self._standardized(rows)).cpu()

    def _standardized(self, rows: np.ndarray) -> Tensor:
        return (torch.from_numpy(rows).to(self.device) - self.mean) / self.std


def _scored(
    task: SegmentationSettings, model: EvalModel, context: EvalContext, classes: np.ndarray, judge: Judge
) -> ProtocolResult:
    """Mean intersection over union of the test images at their own size."""
    test, shown = context.corpus(task.test), list[tuple[int, np.ndarray, np.ndarray]]()
    tokens = dense_labels.extract_grids(model, test, task.grid, task.protocol)
    areas = np.zeros((2, len(test), len(classes)))  # of intersections and unions
    for row in range(len(test)):
        truth = dense_labels.read_map(test, row, task.annotation_suffix)
        judged = judge(tokens.flat(np.array([row]))).T.unflatten(1, tokens.shape)
        found = dense_labels.upsample(judged, truth.shape).argmax(0)
        matrix = _confusion(found, truth, classes)
        areas[:, row] = np.diag(matrix), matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
        if len(shown) < context.settings.pictures and model.name == "model":
            shown.append((row, classes[found.numpy()], truth))

    def miou(rows: np.ndarray) -> float:
        return intersection_over_union(*areas[:, rows].sum(1))

    score = context.scorer(task, model.name).score_images("mIoU", len(test), miou, context.leaked.get(task.test))
    return ProtocolResult([score], {"masks": mask_sheet(test, shown)} if shown else {})


def _confusion(found: Tensor, truth: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Pixels of each class taken for each class, int64 `[classes, classes]`; of what is no class nothing counts."""
    places = np.searchsorted(classes, truth).clip(0, len(classes) - 1)
    target = torch.from_numpy(np.where(classes[places] == truth, places, -1))
    return multiclass_confusion_matrix(found[None], target[None], num_classes=len(classes), ignore_index=-1).numpy()


def intersection_over_union(intersections: np.ndarray, unions: np.ndarray) -> float:
    """Mean over the classes that are there, in truth or in answers; not a number where there are none."""
    there = unions > 0
    return float((intersections[there] / unions[there]).mean()) if there.any() else float("nan")
