"""Accuracy on damaged images, and the mean corruption error (arXiv 1903.12261, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image

from eval.bench import Bench
from eval.chance import generator
from eval.charts import damage_curves
from eval.damages import COUNTED, DAMAGES, damaged
from eval.scores import Outcome, Score
from eval.subject import Subject
from eval.tasks.config import Corruptions
from eval.tasks.knn import predict
from eval.views import preprocessed
from infra.corpora import Corpus
from infra.errors import UserError
from infra.progress import progress
from infra.vectors import at_unit_length
from pretrain.backbones import center_crop
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


def corruptions(task: Corruptions, subject: Subject, bench: Bench) -> Outcome:
    """Mean error over corruptions and severities, and the error of each corruption.

    On sets of 1,000 classes and over all severities also mCE, relative to AlexNet on ImageNet.
    """
    if unknown := sorted(set(task.damages) - set(DAMAGES)):
        raise UserError(f"damages: {unknown[0]}: there are {', '.join(DAMAGES)}")
    names = task.damages or list(COUNTED)
    classes = len(bench.same_classes(task.train, task.test))
    train, test = bench.corpus(task.train), bench.corpus(task.test)
    rows = np.unique(np.linspace(0, len(test) - 1, min(task.images, len(test))).astype(int))
    bank, labels, right = subject.vectors(train), test.labels[rows], {}
    with progress(f"corruptions of {subject.name}", len(names) * len(task.severities) * len(rows)) as advance:
        for name in names:
            for severity in task.severities:
                votes = []
                for start in range(0, len(rows), subject.how.batch):
                    some = rows[start : start + subject.how.batch]
                    queries = _vectors(subject, test, some, name, severity, bench.settings.seed)
                    votes.append(predict(bank, train.labels, queries, classes, task.k, task.temperature))
                    advance(len(some))
                right[name, severity] = np.concatenate(votes).argmax(1) == labels
    leaked = bench.leaked.get(task.test)
    return _told(task, subject, bench, names, right, classes, None if leaked is None else leaked[rows])


def _vectors(subject: Subject, corpus: Corpus, rows: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """Of damaged images, float32 `[n, dim]` at unit length."""
    side, batch = getattr(subject.backbone, "side", 224), []
    for row in rows.tolist():
        chance = generator(seed, name, severity, row)
        image = center_crop(read_image(corpus, row), side)
        batch.append(preprocessed(subject.backbone, Image.fromarray(damaged(image, name, severity, chance))))
    found = subject.backbone.features(torch.stack(batch)).numpy()
    return at_unit_length(found)


def _told(
    task: Corruptions,
    subject: Subject,
    bench: Bench,
    names: list[str],
    right: dict[tuple[str, int], np.ndarray],
    classes: int,
    leaked: np.ndarray | None,
) -> Outcome:
    scorer, images = bench.scorer(task, subject.name), len(next(iter(right.values())))
    wrong = ~np.stack([np.stack([right[name, severity] for severity in task.severities]) for name in names])

    def error(of: np.ndarray, metric: str) -> Score:
        per_image = of.reshape(-1, images).mean(0)
        return scorer.over_images(metric, images, lambda rows: float(per_image[rows].mean()), leaked, better="lower")

    scores = [error(wrong, "error, mean")]
    errors = wrong.mean((1, 2))
    relative = [errors[i] / (_ALEXNET[name] / 100) for i, name in enumerate(names) if name in _ALEXNET]
    if classes == _IMAGENET_CLASSES and relative and sorted(set(task.severities)) == [1, 2, 3, 4, 5]:
        note = f"over {len(relative)} of 15 corruptions"
        scores.append(scorer.plain("mCE", float(np.mean(relative)), images, note, share=True, better="lower"))
    scores += [error(wrong[i], f"error, {name.replace('_', ' ')}") for i, name in enumerate(names)]
    pictures = {}
    if bench.settings.pictures and subject.name == "model":
        pictures["damages"] = damage_curves(task.severities, dict(zip(names, wrong.mean(2).tolist(), strict=True)))
    return Outcome(scores, pictures)
