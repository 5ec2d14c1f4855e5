"""iBOT (arXiv 2111.07832): the student names, behind the mask, what the teacher sees there."""

from __future__ import annotations

from torch import Tensor

from pretrain.data.loader import Batch
from pretrain.models.positions import to_grid
from pretrain.monitoring.collapse_metrics import measure_prototypes
from pretrain.objectives.base import Outputs
from pretrain.objectives.centering import TeacherTargets, cross_entropy
from pretrain.objectives.config import IbotConfig
from pretrain.objectives.dino import Dino
from pretrain.objectives.prototypes import PrototypeObjective


class Ibot(PrototypeObjective):
    """Cross-entropy between teacher and student patch tokens at masked positions."""

    config: IbotConfig

    def tie(self, dino: Dino) -> None:
        """Use DINO's heads, which stay its modules: here they are seen, but neither trained nor saved twice."""
        self.__dict__["head"], self.__dict__["teacher_head"] = dino.head, dino.teacher_head
        self.targets = TeacherTargets(dino.config.head.num_prototypes, self.config.centering)

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`ibot`: mean over the masked tokens of a crop, then over crops."""
        masks, masked = batch.masks, batch.mask_indices
        targets = self.compute_targets(
            outputs, lambda: outputs.teacher_globals.patch_tokens.flatten(0, 1)[masked], temperature
        )
        tokens = to_grid(outputs.masked_student_globals.patch_tokens, masks.shape[1])
        logits = self.head(tokens.flatten(0, 1)[masked])
        losses = cross_entropy(targets, logits, self.student_temperature)
        if outputs.collect_metrics:
            outputs.metrics |= measure_prototypes("ibot", targets, logits, self.student_temperature)
        tokens = masks.sum(1)
        weights = (1 / tokens.clamp_min(1)).unsqueeze(1).expand_as(masks).flatten()[masked]
        crops = len(masks) if self.config.normalize_by == "all" else (tokens > 0).sum().clamp_min(1)
        return {"ibot": (losses * weights).sum() / crops}
