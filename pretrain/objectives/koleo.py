"""KoLeo (arXiv 1806.03198): class tokens of a batch spread out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.data.views import GLOBAL_COUNT
from pretrain.distributed import all_gather_with_grad, first_gathered_row
from pretrain.objectives.base import Objective, Outputs
from pretrain.objectives.config import KoleoConfig


def koleo(x: Tensor, distributed: bool = False) -> Tensor:
    """Minus the mean log distance to the nearest neighbor, of vectors `[n, dim]` set to unit length.

    With `distributed`, neighbors come from all ranks, each of which holds n vectors; gradients reach them.
    """
    x = F.normalize(x, dim=-1, eps=1e-8)
    everywhere, first = (all_gather_with_grad(x), first_gathered_row(len(x))) if distributed else (x, 0)
    with torch.no_grad():
        similarity = x @ everywhere.T
        similarity.diagonal(first).fill_(-1)
        nearest = similarity.argmax(1)
    distance = F.pairwise_distance(x, everywhere[nearest], p=2, eps=1e-8)
    return -(distance + 1e-8).log().mean()


class Koleo(Objective):
    """KoLeo on the student's class tokens, each global crop of the batch by itself."""

    def __init__(self, config: KoleoConfig, *_: Any) -> None:
        super().__init__(config.weight)
        self.config = config

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`koleo`: summed over the two global crops."""
        tokens = outputs.masked_student_globals.class_token
        half = self.config.half_precision and torch.is_autocast_enabled(tokens.device.type)
        tokens = tokens.to(torch.get_autocast_dtype(tokens.device.type) if half else torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            terms = [koleo(crop, self.config.distributed) for crop in tokens.chunk(GLOBAL_COUNT)]
        return {"koleo": torch.stack(terms).sum()}
