"""Retrieval of captions by images and of images by captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.context import EvalContext
from eval.eval_model import EvalModel
from eval.protocols.config import ImageText
from eval.protocols.zero_shot import encode_texts
from eval.stats.scores import ProtocolResult, Score
from infra.corpus.corpus import Corpus
from infra.errors import UserError

_BLOCK = 256  # queries


def image_text(task: ImageText, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Recall at k, of captions by images and of images by captions."""
    corpus, scorer = context.corpus(task.test), context.scorer(task, model.name)
    captions, owner = read_captions(corpus, task.captions_per_line)
    images, texts = model.joint_vectors(corpus), encode_texts(model.text_model, captions)
    leaked = context.leaked.get(task.test)
    own = np.split(np.arange(len(owner)), np.flatnonzero(np.diff(owner)) + 1)
    to_text = rank_answers(images, texts, own)
    to_image = rank_answers(texts, images, [owner[i : i + 1] for i in range(len(texts))])

    def by_texts(k: int) -> Score:
        """Over captions, but resampled by images: the captions of one are alike."""
        hits, counts = np.bincount(owner, to_image < k), np.bincount(owner)

        def value(rows: np.ndarray) -> float:
            return float(hits[rows].sum() / counts[rows].sum())

        return scorer.score_images(f"R@{k}, text to image", len(images), value, leaked, f"{len(texts)} captions")

    return ProtocolResult(
        [scorer.score_accuracy(f"R@{k}, image to text", to_text < k, leaked) for k in task.recall_at]
        + [by_texts(k) for k in task.recall_at],
        answers=to_text < task.recall_at[0],
    )


def read_captions(corpus: Corpus, lines: bool) -> tuple[list[str], np.ndarray]:
    """Captions, and the image of each, int64.

    Raises:
        UserError: an image has none.
    """
    texts: list[str] = []
    owner: list[int] = []
    for row, caption in enumerate(corpus.captions.to_pylist()):
        found = [line.strip() for line in caption.splitlines() if line.strip()] if lines else [caption]
        if not found:
            raise UserError(f"{corpus.artifact.url}: {corpus.key(row)} has an empty caption; fix it and ingest again")
        texts += found
        owner += [row] * len(found)
    return texts, np.array(owner)


def rank_answers(queries: np.ndarray, answers: np.ndarray, right: Sequence[np.ndarray]) -> np.ndarray:
    """How many wrong answers are as near as the nearest right one, or nearer, int64 `[q]`.

    Args:
        queries: unit vectors `[q, dim]`.
        answers: unit vectors `[n, dim]`.
        right: rows of the right answers of each query.
    """
    found = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _BLOCK):
        near = queries[start : start + _BLOCK] @ answers.T
        for i, similar in enumerate(near):
            rows = right[start + i]
            found[start + i] = (similar >= similar[rows].max()).sum() - (similar[rows] >= similar[rows].max()).sum()
    return found
