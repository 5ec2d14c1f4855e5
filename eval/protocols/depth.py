"""Depth from patch tokens: a linear layer says how much speaks for each of many depths (DINOv2, section 7.4)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.context import EvalContext
from eval.data import dense_labels
from eval.data.patch_tokens import PatchTokenGrids
from eval.eval_model import EvalModel
from eval.protocols.config import Depth
from eval.stats.rng import make_rng
from eval.stats.scores import Better, ProtocolResult, Score
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from infra.progress import progress
from pretrain.backbones.base import default_device

_FLOOR = 0.1  # added to what speaks for each bin, as AdaBins does
_VARIANCE = 0.85  # of the scale-invariant loss


def depth(task: Depth, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Root mean square error in meters, and the share of pixels within a factor of 1.25, its square and its cube: of
    each image, averaged over images."""
    train, test = context.corpus(task.train), context.corpus(task.test)
    head = _train(
        task, dense_labels.extract_grids(model, train, task.grid, task.kind), train, context.settings.seed, model.name
    )
    tokens, found_in = dense_labels.extract_grids(model, test, task.grid, task.kind), np.full((len(test), 4), np.nan)
    for row in range(len(test)):
        truth = read_depth(task, test, row)
        with torch.no_grad():
            found = head(torch.from_numpy(tokens.flat(np.array([row]))).to(head.centers.device)).cpu()
        found_in[row] = depth_errors(
            dense_labels.upsample(found.unflatten(0, tokens.shape)[None], truth.shape)[0].numpy(), truth
        )
    scorer, leaked = context.scorer(task, model.name), context.leaked.get(task.test)

    known = np.flatnonzero(~np.isnan(found_in[:, 0]))
    if not len(known):
        raise UserError(f"datasets: {task.test} has no known depth; check `annotation_suffix`, `scale` and `farthest`")

    def score(metric: str, column: int, better: Better) -> Score:
        def value(rows: np.ndarray) -> float:
            return float(found_in[known[rows], column].mean())

        seen = None if leaked is None else leaked[known]
        return scorer.score_images(metric, len(known), value, seen, is_fraction=column > 0, better=better)

    deltas = [score(f"within 1.25^{power}", power, "higher") for power in (1, 2, 3)]
    return ProtocolResult([score("RMSE, m", 0, "lower"), *deltas])


def read_depth(task: Depth, corpus: Corpus, row: int) -> np.ndarray:
    """Depth of each pixel in meters, float32 `[H, W]`; 0 where it is not known, or beyond the bounds."""
    meters = dense_labels.read_map(corpus, row, task.annotation_suffix).astype(np.float32) * task.scale
    return np.where((meters >= task.nearest) & (meters <= task.farthest), meters, 0)


def depth_errors(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Root mean square error over the known pixels, and what share of them lies within a factor of 1.25, 1.25^2 and
    1.25^3; no numbers where none is known."""
    known = truth > 0
    if not known.any():
        return np.full(4, np.nan)
    found, truth = found[known].astype(np.float64), truth[known].astype(np.float64)
    factor = np.maximum(found / truth, truth / found)
    return np.array([((found - truth) ** 2).mean() ** 0.5, *((factor < 1.25**power).mean() for power in (1, 2, 3))])


class _Head(nn.Module):
    """Tokens `[n, dim]` to depths in meters `[n]`."""

    centers: Tensor

    def __init__(self, task: Depth, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.layer = nn.Linear(width, task.bins)
        edges = torch.linspace(task.nearest, task.farthest, task.bins + 1)
        self.register_buffer("centers", (edges[1:] + edges[:-1]) / 2)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = F.relu(self.layer(self.norm(tokens))) + _FLOOR
        return (weights * self.centers).sum(-1) / weights.sum(-1)


def _train(task: Depth, tokens: PatchTokenGrids, train: Corpus, seed: int, title: str) -> _Head:
    torch.manual_seed(seed)
    device = default_device()
    head = _Head(task, tokens.tokens.shape[-1]).to(device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=task.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    means = torch.from_numpy(
        np.stack([_patch_means(read_depth(task, train, row), tokens.shape) for row in range(len(train))])
    )
    chance = make_rng(seed, "depth")
    with progress(f"depth of {title}", task.steps) as advance:
        for _ in range(task.steps):
            batch = chance.choice(len(train), min(task.batch, len(train)), replace=False)
            truth = means[batch].flatten().to(device)
            optimizer.zero_grad()
            loss = scale_invariant_loss(head(torch.from_numpy(tokens.flat(batch)).to(device)), truth)
            loss.backward()
            optimizer.step()
            schedule.step()
            advance()
    return head.eval()


def scale_invariant_loss(found: Tensor, truth: Tensor) -> Tensor:
    """Root of the mean squared log error less most of the squared mean (Eigen et al., 2014), where truth is known."""
    known = truth > 0
    error = found[known].log() - truth[known].log()
    return (
        ((error**2).mean() - _VARIANCE * error.mean() ** 2).clamp_min(1e-9).sqrt() if known.any() else found.sum() * 0
    )


def _patch_means(meters: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Mean of the known depths of each patch, float32 `[h, w]`; 0 where none is."""
    known = F.adaptive_avg_pool2d(torch.from_numpy((meters > 0).astype(np.float32))[None], shape)[0]
    means = F.adaptive_avg_pool2d(torch.from_numpy(meters)[None], shape)[0]
    return torch.where(known > 0, means / known.clamp_min(1e-6), 0).numpy()
