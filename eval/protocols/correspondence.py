"""Points of one image found in another by the most similar patch token."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from eval.context import EvalContext
from eval.data import dense_labels
from eval.data.annotations import read_json
from eval.eval_model import EvalModel
from eval.protocols.config import Correspondence
from eval.stats.scores import ProtocolResult
from infra.config import Config
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from infra.progress import progress
from pretrain.backbones.base import TokenBackbone
from pretrain.data.images import read_image


class Pair(Config):
    """Two images of alike things, and points in them that correspond."""

    source: str
    """Key of an image."""
    target: str
    """Key of another."""
    source_points: list[tuple[float, float]]
    """x and y in pixels of the source."""
    target_points: list[tuple[float, float]]
    """x and y in pixels of the target, in the same order."""
    size: float = Field(gt=0)
    """The larger side of the thing's box in the target."""


def read_pairs(path: str) -> list[Pair]:
    """The pairs of a JSON file.

    Raises:
        UserError: it is missing, or holds something else.
    """
    pairs = read_json(path, list[Pair])
    uneven = [each for each in pairs if len(each.source_points) != len(each.target_points)]
    if uneven or not any(each.source_points for each in pairs):
        raise UserError(f"{path}: points of source and target must be as many, and some there must be")
    return pairs


def correspondence(task: Correspondence, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """PCK: share of points, over all pairs, that are found near where they are."""
    corpus, backbone = context.corpus(task.test), model.token_backbone(task.kind)
    pairs, right = read_pairs(task.pairs), []
    rows = {key: row for row, key in enumerate(corpus.keys)}
    with progress(f"correspondences of {model.name}", len(pairs)) as advance:
        for pair in pairs:
            source, target = (_tokens(task, backbone, corpus, rows, key) for key in (pair.source, pair.target))
            found = match_points(*source, *target, np.array(pair.source_points).reshape(-1, 2))
            distance = np.linalg.norm(found - np.array(pair.target_points).reshape(-1, 2), axis=1)
            right.append((distance <= task.alpha * pair.size).sum())
            advance()
    hits, counts = np.array(right), np.array([len(pair.source_points) for pair in pairs])

    def value(drawn: np.ndarray) -> float:
        return float(hits[drawn].sum() / max(counts[drawn].sum(), 1))

    scorer, note = context.scorer(task, model.name), f"{counts.sum()} points; over pairs"
    return ProtocolResult([scorer.score_images(f"PCK@{task.alpha:g}", len(pairs), value, note=note)])


Seen = tuple[Tensor, tuple[int, int]]
"""Unit patch tokens of an image `[h, w, dim]`, and its width and height in pixels."""


def _tokens(task: Correspondence, backbone: TokenBackbone, corpus: Corpus, rows: dict[str, int], key: str) -> Seen:
    if key not in rows:
        raise UserError(f"{task.pairs}: {key}: no image of {corpus.artifact.url} has this key")
    image = read_image(corpus, rows[key])
    pixels = dense_labels.resize_to_square(image, dense_labels.side_for(backbone, task.grid))
    return F.normalize(dense_labels.patch_tokens(backbone, pixels[None])[0], dim=-1), image.size


def match_points(
    source: Tensor, source_size: tuple[int, int], target: Tensor, target_size: tuple[int, int], points: np.ndarray
) -> np.ndarray:
    """Where points `[n, 2]` (x, y in pixels) of one image lie in the other: at the middle of its most similar patch."""
    height, width = source.shape[:2]
    columns = (points[:, 0] / source_size[0] * width).astype(int).clip(0, width - 1)
    rows = (points[:, 1] / source_size[1] * height).astype(int).clip(0, height - 1)
    near = source[torch.from_numpy(rows), torch.from_numpy(columns)] @ target.flatten(0, 1).T
    best = near.argmax(1).numpy()
    x = (best % target.shape[1] + 0.5) / target.shape[1] * target_size[0]
    y = (best // target.shape[1] + 0.5) / target.shape[0] * target_size[1]
    return np.stack([x, y], 1)
