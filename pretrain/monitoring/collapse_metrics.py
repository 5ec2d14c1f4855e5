"""Measures of collapse: the rank of features, and how evenly prototypes are used."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.distributed import all_gather_with_grad, all_reduce_sum
from pretrain.monitoring.collapse import DIVERGENCE, PREFIX, USAGE


@torch.no_grad()
def rankme(features: Tensor) -> Tensor:
    """RankMe (arXiv 2210.02885, section 3) of vectors `[n, dim]` of every rank: exp of the singular values' entropy."""
    everywhere = all_gather_with_grad(features.float())
    values = torch.linalg.svdvals(torch.nan_to_num(everywhere))  # it refuses what is no number
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return torch.where(everywhere.isfinite().all(), (-(shares * shares.log()).sum()).exp(), torch.nan)


@torch.no_grad()
def measure_prototypes(kind: str, targets: Tensor, logits: Tensor, temperature: float) -> dict[str, Tensor]:
    """How evenly the teacher uses its prototypes, and how far the student is from it.

    Args:
        kind: the objective's.
        targets: distributions `[n, K]`.
        logits: the student's for the same rows `[n, K]`.
        temperature: the student's.

    Returns:
        `usage`: entropy of the mean target over all ranks, divided by that of as many different one-hot targets, at
        most 1; `kl`: mean Kullback-Leibler divergence in nats, over all ranks. NaN where no rank has a row.
    """
    rows = all_reduce_sum(targets.new_tensor(float(len(targets))))
    mean = all_reduce_sum(targets.sum(0)) / rows.clamp_min(1)
    most = torch.log(rows.clamp(2, targets.shape[1]))
    predicted = (logits.float() / temperature).log_softmax(-1)
    divergence = all_reduce_sum((torch.xlogy(targets, targets) - targets * predicted).sum()) / rows
    usage = (-torch.xlogy(mean, mean).sum() / most).clamp(max=1)
    return {
        f"{PREFIX}{kind}_{USAGE}": torch.where(rows > 0, usage, torch.nan),
        f"{PREFIX}{kind}_{DIVERGENCE}": divergence,  # of no rows 0 / 0
    }
