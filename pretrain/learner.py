"""Student, teacher and objectives as one module: what the engine trains, whatever the objectives are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from pretrain.data import photometric
from pretrain.data.config import Views
from pretrain.data.loader import Batch
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.base import Objective, Outputs


class Learner(nn.Module):
    """Runs student and teacher once a batch and hands their outputs to every objective.

    Args:
        student: the backbone that is optimised.
        teacher: the backbone that gives targets; never optimised.
        objectives: losses by name, with their heads.
        views: how crops are normalised.
        distilling: False: the teacher follows the student. True: teacher and teacher heads stay fixed, the student
            sees everything, and `average` follows the student instead (DINOv2, section 5: distillation).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        student: VisionTransformer,
        teacher: VisionTransformer,
        objectives: Mapping[str, Objective],
        views: Views,
        distilling: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.objectives = nn.ModuleDict(objectives)
        self.distilling = distilling
        self.average = copy.deepcopy(student).requires_grad_(False).eval() if distilling else None
        self.register_buffer("mean", torch.tensor(views.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(views.std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        self.teacher.eval()
        for objective in self.losses():
            for _, teacher_head in objective.head_pairs():
                teacher_head.eval()
        return self

    def losses(self) -> Iterator[Objective]:
        for objective in self.objectives.values():
            assert isinstance(objective, Objective)
            yield objective

    def forward(self, batch: Batch, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to optimise and its named terms, before weighting and detached."""
        images = [self._pixels(batch.global_crops, batch.global_photometric)]
        masks: list[Tensor | None] = [None if self.distilling else batch.masks]
        if len(batch.local_crops):
            images.append(self._pixels(batch.local_crops, batch.local_photometric))
            masks.append(None)
        with torch.no_grad():
            teacher = self.teacher(images[:1])[0]
        student = self.student(images, masks)
        outputs = Outputs(student[0], student[1] if len(student) > 1 else None, teacher)
        total = images[0].new_zeros(())
        named: dict[str, Tensor] = {}
        for objective in self.losses():
            terms = objective(outputs, batch, temperature)
            total = total + objective.weight * torch.stack(list(terms.values())).sum()
            named.update({name: term.detach() for name, term in terms.items()})
        return total, named

    def _pixels(self, crops: Tensor, parameters: Tensor) -> Tensor:
        with torch.no_grad():
            return (photometric.apply(crops.float() / 255, parameters) - self.mean) / self.std

    def averages(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(source, average) modules: what is averaged, and where its moving average is kept."""
        if self.average is not None:
            yield self.student, self.average
            return
        yield self.student, self.teacher
        for objective in self.losses():
            yield from objective.head_pairs()

    @torch.no_grad()
    def update_averages(self, momentum: float) -> None:
        """Move every average towards its source: average = momentum * average + (1 - momentum) * source."""
        pairs = list(self.averages())
        sources: list[Tensor] = list(chain.from_iterable(source.parameters() for source, _ in pairs))
        averages: list[Tensor] = list(chain.from_iterable(average.parameters() for _, average in pairs))
        torch._foreach_lerp_(averages, sources, 1 - momentum)

    def released(self) -> VisionTransformer:
        """The backbone that is evaluated and published: the moving average."""
        return self.teacher if self.average is None else self.average
