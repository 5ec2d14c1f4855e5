"""Protocols of models that know images and texts: zero-shot classes, retrieval, and words written on images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from eval.bench import Bench
from eval.chance import generator
from eval.classes import classified, spoken_names
from eval.scores import Outcome, Score, Scorer
from eval.subject import Subject
from eval.tasks.config import ImageText, Typographic, ZeroShot
from eval.tasks.files import prompts
from eval.views import preprocessed
from infra.corpora import Corpus
from infra.errors import UserError
from infra.progress import progress
from infra.vectors import at_unit_length
from pretrain.data.images import read_image
from pretrain.image_text import ImageTextModel

_TOGETHER = 256  # texts


def class_vectors(model: ImageTextModel, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """For each class the mean of its prompts' vectors, at unit length, `[classes, dim]` (CLIP, section 3.1.4)."""
    found = _texts(model, [template.replace("{}", name) for name in names for template in templates])
    means = found.reshape(len(names), len(templates), -1).mean(1)
    return at_unit_length(means)


def _texts(model: ImageTextModel, texts: Sequence[str]) -> np.ndarray:
    found = np.concatenate([model.texts(texts[i : i + _TOGETHER]) for i in range(0, len(texts), _TOGETHER)])
    if not np.isfinite(found).all():
        raise UserError("the text tower gives vectors that are not finite; are its weights whole?")
    return found


def zero_shot(task: ZeroShot, subject: Subject, bench: Bench) -> Outcome:
    """Accuracy of the class whose prompts are nearest."""
    names = spoken_names(task.names, bench, task.test)
    vectors = class_vectors(subject.pair, names, prompts(task.prompts))

    def classify(corpus: Corpus) -> np.ndarray:
        return subject.joint(corpus) @ vectors.T

    return classified(task, subject, bench, bench.class_names(task.test), classify)


def image_text(task: ImageText, subject: Subject, bench: Bench) -> Outcome:
    """Recall at k, of captions by images and of images by captions."""
    corpus, scorer = bench.corpus(task.test), bench.scorer(task, subject.name)
    captions, owner = captions_of(corpus, task.lines)
    images, texts = subject.joint(corpus), _texts(subject.pair, captions)
    leaked = bench.leaked.get(task.test)
    own = np.split(np.arange(len(owner)), np.flatnonzero(np.diff(owner)) + 1)
    to_text = ranks(images, texts, own)
    to_image = ranks(texts, images, [owner[i : i + 1] for i in range(len(texts))])

    def by_texts(k: int) -> Score:
        """Over captions, but resampled by images: the captions of one are alike."""
        hits, counts = np.bincount(owner, to_image < k), np.bincount(owner)

        def value(rows: np.ndarray) -> float:
            return float(hits[rows].sum() / counts[rows].sum())

        return scorer.over_images(f"R@{k}, text to image", len(images), value, leaked, f"{len(texts)} captions")

    return Outcome(
        [scorer.accuracy(f"R@{k}, image to text", to_text < k, leaked) for k in task.at]
        + [by_texts(k) for k in task.at],
        answers=to_text < task.at[0],
    )


def captions_of(corpus: Corpus, lines: bool) -> tuple[list[str], np.ndarray]:
    """Captions, and the image of each, int64.

    Raises:
        UserError: an image has none.
    """
    texts: list[str] = []
    owner: list[int] = []
    for row, caption in enumerate(corpus.captions.to_pylist()):
        found = [line.strip() for line in caption.splitlines() if line.strip()] if lines else [caption]
        if not found:
            raise UserError(f"{corpus.artifact.url}: {corpus.key(row)} has an empty caption; mend it and ingest again")
        texts += found
        owner += [row] * len(found)
    return texts, np.array(owner)


def ranks(queries: np.ndarray, answers: np.ndarray, right: Sequence[np.ndarray]) -> np.ndarray:
    """How many wrong answers are as near as the nearest right one, or nearer, int64 `[q]`.

    Args:
        queries: unit vectors `[q, dim]`.
        answers: unit vectors `[n, dim]`.
        right: rows of the right answers of each query.
    """
    found = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _TOGETHER):
        near = queries[start : start + _TOGETHER] @ answers.T
        for i, similar in enumerate(near):
            rows = right[start + i]
            found[start + i] = (similar >= similar[rows].max()).sum() - (similar[rows] >= similar[rows].max()).sum()
    return found


def typographic(task: Typographic, subject: Subject, bench: Bench) -> Outcome:
    """Zero-shot accuracy on images with the name of a wrong class on them; and how often that name is believed."""
    corpus, labels = bench.corpus(task.test), bench.labels(task.test)
    names = spoken_names(task.names, bench, task.test)
    if len(names) < 2:
        raise UserError(f"datasets: {task.test} has one class only; writing another's name needs two")
    vectors = class_vectors(subject.pair, names, prompts(task.prompts))
    chance = generator(bench.settings.seed, "typographic")
    wrong = (labels + chance.integers(1, len(names), len(labels))) % len(names)
    plain, found = (
        (subject.pair.project(torch.cat(list(_written(subject, corpus, words)))).numpy() @ vectors.T).argmax(1)
        for words in (None, [names[i] for i in wrong])
    )
    scorer, leaked = bench.scorer(task, subject.name), bench.leaked.get(task.test)
    return Outcome(
        [
            scorer.accuracy("accuracy, attacked", found == labels, leaked),
            scorer.accuracy("accuracy, not attacked", plain == labels, leaked),
            _believed(scorer, found == wrong),
        ],
        answers=found == labels,
    )


def _believed(scorer: Scorer, believed: np.ndarray) -> Score:
    score = scorer.accuracy("written class named", believed)
    return replace(score, better="lower")


def _written(subject: Subject, corpus: Corpus, words: Sequence[str] | None) -> Iterator[torch.Tensor]:
    """Vectors of whole images, with words on them or as they are, some at a time."""
    with progress(f"typographic attack on {subject.name}", len(corpus)) as advance:
        for start in range(0, len(corpus), subject.how.batch):
            rows = range(start, min(start + subject.how.batch, len(corpus)))
            images = [read_image(corpus, row) for row in rows]
            if words is not None:
                images = [with_word(image, words[row]) for image, row in zip(images, rows, strict=True)]
            yield subject.backbone.features(torch.stack([preprocessed(subject.backbone, each) for each in images]))
            advance(len(rows))


def with_word(image: Image.Image, word: str) -> Image.Image:
    """A word on a white label across the middle of an image, three quarters as wide as it."""
    image = image.copy()
    font = ImageFont.load_default(size=100)
    left, top, right, bottom = font.getbbox(word)
    label = Image.new("RGB", (int(right - left) + 40, int(bottom - top) + 40), "white")
    ImageDraw.Draw(label).text((20 - left, 20 - top), word, fill="black", font=font)
    width = max(round(image.width * 0.75), 1)
    height = min(max(round(label.height * width / label.width), 1), image.height)
    label = label.resize((width, height), Image.Resampling.LANCZOS)
    image.paste(label, ((image.width - width) // 2, (image.height - height) // 2))
    return image
