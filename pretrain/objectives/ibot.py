"""iBOT (arXiv 2111.07832): the student names, behind the mask, what the teacher sees there."""

from __future__ import annotations

from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.objectives.base import Outputs
from pretrain.objectives.centering import cross_entropy
from pretrain.objectives.prototypes import PrototypeObjective


class Ibot(PrototypeObjective):
    """Cross-entropy between teacher and student patch tokens at masked positions."""

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`ibot`: mean over masked tokens of an image, then summed over images / number of global crops (DINOv2)."""
        masks = batch.masks
        targets = self.targets(self.teacher_head(outputs.teacher_globals.patch_tokens[masks].float()), temperature)
        logits = self.head(outputs.student_globals.patch_tokens[masks])
        losses = cross_entropy(targets, logits, self.student_temperature)
        weights = (1 / masks.sum(1).clamp_min(1)).unsqueeze(1).expand_as(masks)[masks]
        return {"ibot": (losses * weights).sum() / len(masks)}
