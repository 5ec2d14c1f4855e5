"""Teacher logits to target distributions, kept from collapsing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.distributed import all_reduce_sum, is_distributed
from pretrain.objectives.config import Centering

_SINKHORN_ITERATIONS = 3


def sinkhorn_knopp(logits: Tensor, temperature: float) -> Tensor:
    """Balanced assignment of n samples, over all ranks, to K prototypes (arXiv 2006.09882, section 3.1).

    Args:
        logits: `[n, K]` of this rank; n may differ between ranks.

    Returns:
        float32 `[n, K]`: each row sums to 1, each column, over all ranks, to about the number of samples / K.
    """
    scaled = logits.float() / temperature
    largest = scaled.max() if len(scaled) else scaled.new_tensor(-torch.inf)
    if is_distributed():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    q = torch.exp(scaled - largest)  # the constant cancels; it keeps exp from overflowing
    samples = all_reduce_sum(q.new_tensor(float(len(q))))
    for _ in range(_SINKHORN_ITERATIONS):
        columns = all_reduce_sum(q.sum(0, keepdim=True))
        q = q / columns.clamp_min(1e-30) / q.shape[1]
        q = q / q.sum(1, keepdim=True).clamp_min(1e-30) / samples
    return q * samples


class TeacherTargets(nn.Module):
    """Targets from teacher logits, by Sinkhorn-Knopp or by a centered softmax (arXiv 2104.14294, section 3.1).

    The center moves once a step, however many micro-batches that has: towards the mean of all their logits.
    """

    center: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, prototypes: int, centering: Centering, momentum: float = 0.9) -> None:
        super().__init__()
        self.centering = centering
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, prototypes))
        self.register_buffer("total", torch.zeros(1, prototypes))
        self.register_buffer("count", torch.zeros(1))

    @torch.no_grad()
    def begin_step(self) -> None:
        """Move the center by the logits of the step before."""
        if self.centering == "softmax":
            moved = self.center.lerp(self.total / self.count.clamp_min(1), 1 - self.momentum)
            self.center.copy_(torch.where(self.count > 0, moved, self.center))
            self.total.zero_()
            self.count.zero_()

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """`[n, K]` to distributions `[n, K]`, float32. In training the center will move towards these logits."""
        if self.centering == "sinkhorn":
            return sinkhorn_knopp(logits, temperature)
        targets = ((logits.float() - self.center) / temperature).softmax(-1)
        if self.training:
            self.count += all_reduce_sum(logits.new_tensor([float(len(logits))], dtype=torch.float32))
            self.total += all_reduce_sum(logits.float().sum(0, keepdim=True))
        return targets


def cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """-sum(targets * log softmax(logits / temperature)) for each row: `[n, K]`, `[n, K]` to float32 `[n]`."""
    return -(targets * (logits.float() / temperature).log_softmax(-1)).sum(-1)
