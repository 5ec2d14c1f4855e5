"""Masks carried through videos by patch likeness (DINO, section 4.2.2), scored as DAVIS 2017 does."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import binary_dilation
from skimage.morphology import disk
from torch import Tensor

from eval.context import EvalContext
from eval.data import dense_labels
from eval.eval_model import EvalModel
from eval.protocols.config import VideoSegmentation
from eval.stats.scores import ProtocolResult, Score
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from infra.progress import progress
from pretrain.backbones.base import TokenBackbone
from pretrain.data.images import read_image

_VOID = 255
_TOLERANCE = 0.008  # of a frame's diagonal, within which boundaries count as the same

Remembered = tuple[Tensor, Tensor]
"""A frame's unit tokens `[h, w, dim]` and its masks `[h, w, objects + 1]`."""


def video_segmentation(task: VideoSegmentation, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Mean of region and boundary agreement over objects, and each by itself."""
    corpus, backbone = context.corpus(task.test), model.token_backbone(task.kind)
    videos = group_videos(corpus)
    found: list[tuple[float, float]] = []
    with progress(f"propagation of {model.name}", len(corpus)) as advance:
        for frames in videos.values():
            found += _score_video(task, backbone, corpus, frames)
            advance(len(frames))
    if not found:
        raise UserError(f"datasets: {task.test} has no object in a first frame and a frame after it")
    agreement, scorer = np.array(found), context.scorer(task, model.name)

    def score(metric: str, values: np.ndarray) -> Score:
        return scorer.score_images(metric, len(values), lambda rows: float(values[rows].mean()), note="over objects")

    parts = [score(name, agreement[:, i]) for i, name in enumerate(("J", "F"))]
    return ProtocolResult([score("J&F", agreement.mean(1)), *parts])


def group_videos(corpus: Corpus) -> dict[str, list[int]]:
    """Rows of the frames of each video, in the order of their keys: what is before a key's last slash is its video."""
    videos: dict[str, list[int]] = {}
    for row in np.argsort(np.array(corpus.keys)):
        videos.setdefault(corpus.keys[row].rpartition("/")[0], []).append(int(row))
    return videos


def _score_video(
    task: VideoSegmentation, backbone: TokenBackbone, corpus: Corpus, frames: list[int]
) -> list[tuple[float, float]]:
    """Region and boundary agreement of each object of the first frame, means over the frames between first and last."""
    first = dense_labels.read_map(corpus, frames[0], task.annotation_suffix)
    objects = np.setdiff1d(np.unique(first), [0, _VOID])
    tokens = _tokens(task, backbone, corpus, frames[0])
    start = _shares(first, objects, (tokens.shape[0], tokens.shape[1]))
    before: deque[Remembered] = deque(maxlen=task.num_context_frames)
    scores = []
    for place, row in enumerate(frames[1:], 1):
        tokens_now = _tokens(task, backbone, corpus, row)
        masks = propagate(tokens_now, [(tokens, start), *before], task)
        before.append((tokens_now, masks))
        if place < len(frames) - 1 or len(frames) == 2:  # DAVIS scores neither the first nor the last frame
            truth = dense_labels.read_map(corpus, row, task.annotation_suffix)
            stretched = masks / masks.flatten(0, 1).amax(0).clamp_min(1e-6)
            answer = dense_labels.upsample(stretched.permute(2, 0, 1), truth.shape).argmax(0).numpy()
            pairs = [(answer == i + 1, truth == each) for i, each in enumerate(objects)]
            scores.append([(region_similarity(*pair), boundary_accuracy(*pair)) for pair in pairs])
    return [(float(j), float(f)) for j, f in np.mean(scores, axis=0)] if scores and len(objects) else []


def _tokens(task: VideoSegmentation, backbone: TokenBackbone, corpus: Corpus, row: int) -> Tensor:
    """Unit patch tokens of a frame `[h, w, dim]`, at the frame's shape where the backbone can."""
    image = read_image(corpus, row)
    width = height = backbone.side
    if backbone.any_size:
        scale = task.grid / min(image.size)
        width, height = (max(round(each * scale), 1) * backbone.patch for each in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return F.normalize(dense_labels.patch_tokens(backbone, pixels[None])[0], dim=-1)


def _shares(values: np.ndarray, objects: np.ndarray, shape: tuple[int, int]) -> Tensor:
    """How much of each patch is background and each object, `[h, w, objects + 1]`."""
    layers = np.stack([~np.isin(values, objects), *(values == each for each in objects)]).astype(np.float32)
    return F.adaptive_avg_pool2d(torch.from_numpy(layers), shape).permute(1, 2, 0)


def propagate(tokens: Tensor, context: list[Remembered], task: VideoSegmentation) -> Tensor:
    """Masks of a frame, `[h, w, objects + 1]`: of each patch the weighted mean of those of its nearest patches.

    Args:
        tokens: unit tokens of the frame `[h, w, dim]`.
        context: frames before it.
    """
    height, width = tokens.shape[:2]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([rows, columns], -1).flatten(0, 1)
    far = (place[:, None] - place[None]).abs().amax(-1) > task.radius
    near, masks = [], []
    for other, mask in context:
        near.append((tokens.flatten(0, 1) @ other.flatten(0, 1).T).masked_fill(far, -torch.inf))
        masks.append(mask.flatten(0, 1))
    everything = torch.cat(near, dim=1)
    cosines, found = everything.topk(min(task.num_neighbors, everything.shape[1]), dim=1)
    weights = ((cosines - cosines[:, :1]) / task.temperature).exp()
    weights = weights / weights.sum(1, keepdim=True)
    return (weights[..., None] * torch.cat(masks)[found]).sum(1).unflatten(0, (height, width))


def region_similarity(found: np.ndarray, truth: np.ndarray) -> float:
    """J: intersection over union of two masks; 1 where both are empty."""
    union = (found | truth).sum()
    return float((found & truth).sum() / union) if union else 1.0


def boundary_accuracy(found: np.ndarray, truth: np.ndarray) -> float:
    """F: harmonic mean of the shares of each outline that lie near the other one."""
    near = disk(max(math.ceil(_TOLERANCE * math.hypot(*truth.shape)), 1)).astype(bool)
    ours, theirs = _outline(found), _outline(truth)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    precision = (ours & binary_dilation(theirs, near)).sum() / ours.sum()
    recall = (theirs & binary_dilation(ours, near)).sum() / theirs.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _outline(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one right of, below, or right below them."""
    mask = mask.astype(bool)
    edges = np.zeros_like(mask)
    edges[:, :-1] |= mask[:, :-1] ^ mask[:, 1:]
    edges[:-1] |= mask[:-1] ^ mask[1:]
    edges[:-1, :-1] |= mask[:-1, :-1] ^ mask[1:, 1:]
    return edges
