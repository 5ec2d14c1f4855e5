"""Accuracy on damaged images, and the mean corruption error (arXiv 1903.12261, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image

from eval.context import EvalContext
from eval.data.image_corruptions import CORRUPTIONS, MCE_CORRUPTIONS, corrupt
from eval.data.views import preprocess
from eval.eval_model import EvalModel
from eval.protocols.config import Corruptions
from eval.protocols.knn import predict
from eval.report.charts import corruption_curves
from eval.stats.rng import make_rng
from eval.stats.scores import ProtocolResult, Score
from infra.compute.sharded_array import l2_normalize
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from infra.progress import progress
from pretrain.backbones.preprocessing import center_crop
from pretrain.data.images import read_image

# Mean errors over severities of AlexNet, in percent, by which the paper divides (table 1).
_ALEXNET: Mapping[str, float] = {
    "gaussian_noise": 88.6,
    "shot_noise": 89.4,
    "impulse_noise": 92.3,
    "defocus_blur": 82.0,
    "glass_blur": 82.6,
    "motion_blur": 78.6,
    "zoom_blur": 79.8,
    "snow": 86.7,
    "fog": 81.9,
    "brightness": 56.5,
    "contrast": 85.3,
    "elastic_transform": 64.6,
    "pixelate": 71.8,
    "jpeg_compression": 60.7,
}
_IMAGENET_CLASSES = 1000


def corruptions(task: Corruptions, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Mean error over corruptions and severities, and the error of each corruption.

    On sets of 1,000 classes and over all severities also mCE, relative to AlexNet on ImageNet.
    """
    if unknown := sorted(set(task.corruptions) - set(CORRUPTIONS)):
        raise UserError(f"corruptions: {unknown[0]}: there are {', '.join(CORRUPTIONS)}")
    names = task.corruptions or list(MCE_CORRUPTIONS)
    classes = len(context.require_same_classes(task.train, task.test))
    train, test = context.corpus(task.train), context.corpus(task.test)
    rows = np.unique(np.linspace(0, len(test) - 1, min(task.images, len(test))).astype(int))
    bank, labels, right = model.vectors(train), test.labels[rows], {}
    with progress(f"corruptions of {model.name}", len(names) * len(task.severities) * len(rows)) as advance:
        for name in names:
            for severity in task.severities:
                votes = []
                for start in range(0, len(rows), model.extraction.batch):
                    some = rows[start : start + model.extraction.batch]
                    queries = _vectors(model, test, some, name, severity, context.settings.seed)
                    votes.append(predict(bank, train.labels, queries, classes, task.k, task.temperature))
                    advance(len(some))
                right[name, severity] = np.concatenate(votes).argmax(1) == labels
    leaked = context.leaked.get(task.test)
    return _build_result(task, model, context, names, right, classes, None if leaked is None else leaked[rows])


def _vectors(model: EvalModel, corpus: Corpus, rows: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """Of damaged images, float32 `[n, dim]` at unit length."""
    side, batch = getattr(model.backbone, "side", 224), []
    for row in rows.tolist():
        chance = make_rng(seed, name, severity, row)
        image = center_crop(read_image(corpus, row), side)
        batch.append(preprocess(model.backbone, Image.fromarray(corrupt(image, name, severity, chance))))
    found = model.backbone.features(torch.stack(batch)).numpy()
    return l2_normalize(found)


def _build_result(
    task: Corruptions,
    model: EvalModel,
    context: EvalContext,
    names: list[str],
    right: dict[tuple[str, int], np.ndarray],
    classes: int,
    leaked: np.ndarray | None,
) -> ProtocolResult:
    scorer, images = context.scorer(task, model.name), len(next(iter(right.values())))
    wrong = ~np.stack([np.stack([right[name, severity] for severity in task.severities]) for name in names])

    def error(of: np.ndarray, metric: str) -> Score:
        per_image = of.reshape(-1, images).mean(0)
        return scorer.score_images(metric, images, lambda rows: float(per_image[rows].mean()), leaked, better="lower")

    scores = [error(wrong, "error, mean")]
    errors = wrong.mean((1, 2))
    relative = [errors[i] / (_ALEXNET[name] / 100) for i, name in enumerate(names) if name in _ALEXNET]
    if classes == _IMAGENET_CLASSES and relative and sorted(set(task.severities)) == [1, 2, 3, 4, 5]:
        note = f"over {len(relative)} of 15 corruptions"
        scores.append(
            scorer.score_value("mCE", float(np.mean(relative)), images, note, is_fraction=True, better="lower")
        )
    scores += [error(wrong[i], f"error, {name.replace('_', ' ')}") for i, name in enumerate(names)]
    pictures = {}
    if context.settings.pictures and model.name == "model":
        pictures["corruptions"] = corruption_curves(
            task.severities, dict(zip(names, wrong.mean(2).tolist(), strict=True))
        )
    return ProtocolResult(scores, pictures)
