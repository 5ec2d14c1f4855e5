"""Features of all ranks, with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(x: Tensor) -> Tensor:
    """Rows of all ranks in the order of the ranks, `[world size * n, ...]`; each rank gets the gradients of its own.

    The ranks' gradients are averaged afterwards, so a loss that is a mean over each rank's rows has the gradient of
    the mean over all rows.
    """
    if not several_ranks():
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(list(all_gather(x.contiguous())))
