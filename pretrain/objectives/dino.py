"""DINO (arXiv 2104.14294), with DINOv2's normalization: agreement of class tokens between crops."""

from __future__ import annotations

from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.data.views import GLOBAL_COUNT
from pretrain.monitoring.collapse_metrics import measure_prototypes
from pretrain.objectives.base import Outputs
from pretrain.objectives.centering import cross_entropy
from pretrain.objectives.config import DinoConfig
from pretrain.objectives.prototypes import PrototypeObjective


class Dino(PrototypeObjective):
    """Cross-entropy from each teacher global crop to every other student crop."""

    config: DinoConfig

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`dino_global` and `dino_local`: means over the 2 + 2L crop pairs together (DINOv2, ssl_meta_arch)."""
        targets = self.compute_targets(outputs, lambda: outputs.teacher_globals.class_token, temperature)
        student_globals = self.head(outputs.masked_student_globals.class_token)
        local_crops = 0
        terms = {}
        images = len(targets) // GLOBAL_COUNT
        if outputs.student_locals is not None:
            logits = self.head(outputs.student_locals.class_token)
            local_crops = len(logits) // images
        pairs = GLOBAL_COUNT * (GLOBAL_COUNT - 1) + GLOBAL_COUNT * local_crops
        swapped = targets.roll(images, 0)
        both = cross_entropy(swapped, student_globals, self.student_temperature)
        if outputs.collect_metrics:
            outputs.metrics |= measure_prototypes("dino", swapped, student_globals, self.student_temperature)
        terms["dino_global"] = GLOBAL_COUNT * both.mean() / pairs
        if local_crops:
            # Every local crop meets both teacher crops: the mean over pairs is linear in the targets.
            summed = targets.unflatten(0, (GLOBAL_COUNT, images)).sum(0).repeat(local_crops, 1)
            losses = cross_entropy(summed, logits, self.student_temperature)
            terms["dino_local"] = self.config.local_weight * local_crops * losses.mean() / pairs
        return terms
