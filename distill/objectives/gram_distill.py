"""Relational distillation: an image's patch tokens are as like each other as the teacher's are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distill.objectives.config import GramDistillConfig
from pretrain.data.loader import Batch
from pretrain.models.positions import to_grid
from pretrain.objectives.base import Objective, Outputs
from pretrain.objectives.gram import gram_loss


class GramDistill(Objective):
    """Mean squared difference of all cosines between patch tokens, on the teacher's grid."""

    def __init__(self, config: GramDistillConfig, teachers: Sequence[str]) -> None:
        super().__init__(config.weight)
        self.teachers = list(teachers)

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`gram_distill_NAME` for each teacher."""
        terms = {}
        for name in self.teachers:
            wanted = outputs.teachers.features(name).patch_tokens
            own = to_grid(outputs.masked_student_globals.patch_tokens, wanted.shape[1])
            terms[f"gram_distill_{name}"] = gram_loss(own, wanted)
        return terms
