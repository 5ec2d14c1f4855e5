"""What DINO and iBOT share: a student and a teacher head over prototypes, and balanced targets."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from pretrain.models.config import HeadConfig, VisionTransformerConfig
from pretrain.models.heads import PrototypeHead, teacher_copy
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.base import Objective
from pretrain.objectives.centering import Targets
from pretrain.objectives.config import DinoConfig, IbotConfig


class PrototypeObjective(Objective):
    """An objective whose student head is trained to give the teacher head's targets."""

    config: DinoConfig | IbotConfig
    head: PrototypeHead
    teacher_head: PrototypeHead
    targets: Targets

    def __init__(
        self, config: DinoConfig | IbotConfig, student: VisionTransformerConfig, teacher: VisionTransformerConfig
    ) -> None:
        super().__init__(config, student, teacher)
        self.student_temperature = config.student_temperature
        if not (isinstance(config, IbotConfig) and config.tied):
            self._make_heads(config.head, student.dim, teacher.dim)

    def _make_heads(self, head: HeadConfig, dim: int, teacher_dim: int) -> None:
        self.head = PrototypeHead(dim, head)
        self.teacher_head = teacher_copy(self.head, head, dim, teacher_dim)
        self.targets = Targets(head.prototypes, self.config.centering)

    def begin_step(self, step: int, teacher: VisionTransformer) -> Iterator[tuple[nn.Module, nn.Module]]:
        self.targets.begin_step()
        return iter(())

    def head_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        if "head" in self._modules:
            yield self.head, self.teacher_head

    def last_layers(self) -> Iterator[nn.Module]:
        if "head" in self._modules:
            yield self.head.last_layer
