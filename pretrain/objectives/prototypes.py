"""What DINO and iBOT share: a student and a teacher head over prototypes, and balanced targets."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from pretrain.models.heads import PrototypeHead, teacher_copy
from pretrain.objectives.base import Objective
from pretrain.objectives.centering import Targets
from pretrain.objectives.config import DinoConfig, IbotConfig


class PrototypeObjective(Objective):
    """An objective whose student head is trained to give the teacher head's targets."""

    def __init__(self, config: DinoConfig | IbotConfig, dim: int, teacher_dim: int) -> None:
        super().__init__()
        self.weight = config.weight
        self.student_temperature = config.student_temperature
        self.head = PrototypeHead(dim, config.head)
        self.teacher_head = teacher_copy(self.head, config.head, dim, teacher_dim)
        self.targets = Targets(config.head.prototypes, config.centering)

    def head_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.head, self.teacher_head

    def last_layers(self) -> Iterator[nn.Module]:
        yield self.head.last_layer
