"""What DINO and iBOT share: a student and a teacher head over prototypes, and balanced targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from pretrain.models.config import HeadConfig
from pretrain.models.heads import DINOHead, teacher_copy
from pretrain.objectives.base import BackboneWidths, Objective, Outputs
from pretrain.objectives.centering import TeacherTargets
from pretrain.objectives.config import DinoConfig, IbotConfig


class PrototypeObjective(Objective):
    """An objective whose student head is trained to give the teacher head's targets."""

    config: DinoConfig | IbotConfig
    head: DINOHead
    teacher_head: DINOHead
    targets: TeacherTargets

    def __init__(self, config: DinoConfig | IbotConfig, student: BackboneWidths, teacher: BackboneWidths) -> None:
        super().__init__(config.weight)
        self.config = config
        self.student_temperature = config.student_temperature
        if not (isinstance(config, IbotConfig) and config.share_head):
            dim = student.patch_dim if isinstance(config, IbotConfig) else student.embed_dim
            self._make_heads(config.head, dim, teacher.embed_dim)

    def _make_heads(self, head: HeadConfig, dim: int, teacher_dim: int) -> None:
        self.head = DINOHead(dim, head)
        self.teacher_head = teacher_copy(self.head, head, dim, teacher_dim)
        self.targets = TeacherTargets(head.num_prototypes, self.config.centering)

    def train(self, mode: bool = True) -> PrototypeObjective:
        super().train(mode)
        self.teacher_head.eval()
        return self

    def share_teacher_state(self, other: PrototypeObjective) -> None:
        """Take another objective's targets, whose modules stay its own: here they are seen, but not saved twice."""
        for name in ("teacher_head", "targets"):
            self._modules.pop(name, None)
            self.__dict__[name] = getattr(other, name)

    def compute_targets(self, outputs: Outputs, tokens: Callable[[], Tensor], temperature: float) -> Tensor:
        """Targets `[n, K]` of the teacher's tokens `[n, dim]`, the same for all students."""
        return outputs.teachers.cached(
            self.config.kind, lambda: self.targets(self.teacher_head(tokens().float()), temperature)
        )

    def begin_step(self, step: int, teacher: nn.Module | None) -> Iterator[tuple[nn.Module, nn.Module]]:
        if "targets" in self._modules:
            self.targets.begin_step()
        return iter(())

    def head_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        if "head" in self._modules:
            yield self.head, self.teacher_head

    def last_layers(self) -> Iterator[nn.Module]:
        if "head" in self._modules:
            yield self.head.last_layer
