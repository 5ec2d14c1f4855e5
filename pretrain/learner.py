"""Student, teacher and objectives as one module: what the engine trains, whatever the objectives are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pretrain import health
from pretrain.config import Precision
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

    Attributes:
        looking: whether the next passes tell how healthy the features are.
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
        self.precision: Precision = "fp32"
        self.looking = False
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
        """The loss to optimise and its named terms, before weighting and detached; with `looking`, health too."""
        # Here, not around the engine: DeepSpeed's forward switches an outer autocast off.
        with torch.autocast(batch.global_crops.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self._losses(batch, temperature)

    def _losses(self, batch: Batch, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = self._outputs(batch)
        total = outputs.images.new_zeros(())
        named: dict[str, Tensor] = {}
        for objective in self.losses():
            for name, term in objective(outputs, batch, temperature).items():
                total = total + objective.weight * term
                named[name] = term.detach()
        if self.looking:
            named |= outputs.health
            seen = outputs.seen_globals(self.distilling)
            if seen is not None:
                named[health.RANK] = health.rankme(seen.class_token)
        return total, named

    def begin_step(self, step: int) -> list[tuple[nn.Module, nn.Module]]:
        """Tell the objectives which optimiser step comes next; return (source, copy) modules to be copied before it."""
        return [pair for objective in self.losses() for pair in objective.begin_step(step, self.teacher)]

    @torch.no_grad()
    def _outputs(self, batch: Batch) -> Outputs:
        return Outputs(
            student=self.student,
            teacher=self.teacher,
            images=self._images(batch.global_crops, batch.global_photometric),
            local_images=self._images(batch.local_crops, batch.local_photometric) if len(batch.local_crops) else None,
            plain_images=self._images(batch.plain_crops) if len(batch.plain_crops) else None,
            masks=None if self.distilling else batch.masks,
            looking=self.looking,
        )

    def _images(self, crops: Tensor, recolouring: Tensor | None = None) -> Tensor:
        """Crops as the network takes them, recoloured here where the loader has not done it."""
        images = crops.float() / 255
        if recolouring is not None and len(recolouring):
            images = photometric.apply(images, recolouring)
        return (images - self.mean) / self.std

    def averages(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(source, average) modules: what is averaged, and where its moving average is kept."""
        if self.average is not None:
            yield self.student, self.average
            return
        yield self.student, self.teacher
        for objective in self.losses():
            yield from objective.head_pairs()

    def released(self) -> VisionTransformer:
        """The backbone that is evaluated and published: the moving average."""
        return self.teacher if self.average is None else self.average
