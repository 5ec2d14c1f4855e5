"""iBOT (arXiv 2111.07832): the student names, behind the mask, what the teacher sees there."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from pretrain.config import IbotConfig
from pretrain.data.loader import Batch
from pretrain.models.heads import PrototypeHead, teacher_copy
from pretrain.objectives.base import Objective, Outputs
from pretrain.objectives.centering import Targets, cross_entropy


class Ibot(Objective):
    """Cross-entropy between teacher and student patch tokens at masked positions."""

    def __init__(self, config: IbotConfig, dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.weight = config.weight
        self.student_temperature = config.student_temperature
        self.head = PrototypeHead(dim, config.head)
        self.teacher_head = teacher_copy(self.head, config.head, dim, teacher_dim)
        self.targets = Targets(config.head.prototypes, config.centering)

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`ibot`: mean over masked tokens of an image, then summed over images / number of global crops (DINOv2)."""
        masks = batch.masks
        targets = self.targets(self.teacher_head(outputs.teacher_globals.patch_tokens[masks].float()), temperature)
        logits = self.head(outputs.student_globals.patch_tokens[masks])
        losses = cross_entropy(targets, logits, self.student_temperature)
        weights = (1 / masks.sum(1).clamp_min(1)).unsqueeze(1).expand_as(masks)[masks]
        return {"ibot": (losses * weights).sum() / len(masks)}

    def head_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.head, self.teacher_head

    def last_layers(self) -> Iterator[nn.Module]:
        yield self.head.last_layer
