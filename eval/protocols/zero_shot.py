"""Protocols of models that know images and texts: zero-shot classes, retrieval, and words written on images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from eval.context import EvalContext
from eval.data.views import preprocess
from eval.eval_model import EvalModel
from eval.protocols.classification import score_classification, spoken_names
from eval.protocols.config import Typographic, ZeroShot
from eval.protocols.files import read_prompts
from eval.stats.rng import make_rng
from eval.stats.scores import ProtocolResult, Score, Scorer
from infra.compute.sharded_array import l2_normalize
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from infra.progress import progress
from pretrain.backbones.image_text import ImageTextModel
from pretrain.data.images import read_image

_TOGETHER = 256  # texts


def class_vectors(model: ImageTextModel, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """For each class the mean of its prompts' vectors, at unit length, `[classes, dim]` (CLIP, section 3.1.4)."""
    found = encode_texts(model, [template.replace("{}", name) for name in names for template in templates])
    means = found.reshape(len(names), len(templates), -1).mean(1)
    return l2_normalize(means)


def encode_texts(model: ImageTextModel, texts: Sequence[str]) -> np.ndarray:
    """Vectors of texts at unit length, float32 `[texts, dim]`.

    Raises:
        UserError: they are not all finite.
    """
    found = np.concatenate([model.texts(texts[i : i + _TOGETHER]) for i in range(0, len(texts), _TOGETHER)])
    if not np.isfinite(found).all():
        raise UserError("the text tower gives vectors that are not finite; are its weights whole?")
    return found


def zero_shot(task: ZeroShot, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Accuracy of the class whose prompts are nearest."""
    names = spoken_names(task.class_names, context, task.test)
    vectors = class_vectors(model.text_model, names, read_prompts(task.prompts))

    def classify(corpus: Corpus) -> np.ndarray:
        return model.joint_vectors(corpus) @ vectors.T

    return score_classification(task, model, context, context.class_names(task.test), classify)


def typographic(task: Typographic, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Zero-shot accuracy on images with the name of a wrong class on them; and how often that name is believed."""
    corpus, labels = context.corpus(task.test), context.labels_of(task.test)
    names = spoken_names(task.class_names, context, task.test)
    if len(names) < 2:
        raise UserError(f"datasets: {task.test} has one class only; writing another's name needs two")
    vectors = class_vectors(model.text_model, names, read_prompts(task.prompts))
    chance = make_rng(context.settings.seed, "typographic")
    wrong = (labels + chance.integers(1, len(names), len(labels))) % len(names)
    plain, found = (
        (model.text_model.project(torch.cat(list(_write_words(model, corpus, words)))).numpy() @ vectors.T).argmax(1)
        for words in (None, [names[i] for i in wrong])
    )
    scorer, leaked = context.scorer(task, model.name), context.leaked.get(task.test)
    return ProtocolResult(
        [
            scorer.score_accuracy("accuracy, attacked", found == labels, leaked),
            scorer.score_accuracy("accuracy, not attacked", plain == labels, leaked),
            _score_believed(scorer, found == wrong),
        ],
        answers=found == labels,
    )


def _score_believed(scorer: Scorer, believed: np.ndarray) -> Score:
    score = scorer.score_accuracy("written class named", believed)
    return replace(score, better="lower")


def _write_words(model: EvalModel, corpus: Corpus, words: Sequence[str] | None) -> Iterator[torch.Tensor]:
    """Vectors of whole images, with words on them or as they are, some at a time."""
    with progress(f"typographic attack on {model.name}", len(corpus)) as advance:
        for start in range(0, len(corpus), model.extraction.batch):
            rows = range(start, min(start + model.extraction.batch, len(corpus)))
            images = [read_image(corpus, row) for row in rows]
            if words is not None:
                images = [draw_word(image, words[row]) for image, row in zip(images, rows, strict=True)]
            yield model.backbone.features(torch.stack([preprocess(model.backbone, each) for each in images]))
            advance(len(rows))


def draw_word(image: Image.Image, word: str) -> Image.Image:
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
