"""KoLeo (arXiv 1806.03198): class tokens of a batch spread out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.data.views import GLOBAL_COUNT
from pretrain.objectives.base import Objective, Outputs
from pretrain.objectives.config import KoleoConfig


def koleo(x: Tensor) -> Tensor:
    """Minus the mean log distance to the nearest neighbour, in float32, of vectors `[n, dim]` set to unit length."""
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=1e-8)
        with torch.no_grad():
            similarity = x @ x.T
            similarity.fill_diagonal_(-1)
            nearest = similarity.argmax(1)
        distance = F.pairwise_distance(x, x[nearest], p=2, eps=1e-8)
        return -(distance + 1e-8).log().mean()


class Koleo(Objective):
    """KoLeo on the student's class tokens, each global crop of the batch by itself."""

    def __init__(self, config: KoleoConfig, dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.weight = config.weight

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`koleo`: summed over the two global crops."""
        crops = outputs.student_globals.class_token.chunk(GLOBAL_COUNT)
        return {"koleo": torch.stack([koleo(crop) for crop in crops]).sum()}
