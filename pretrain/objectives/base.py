"""What an objective is: a module that owns its heads and turns backbone outputs into named loss terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from pretrain.data.loader import Batch
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.vit import Features, VisionTransformer
from pretrain.objectives.config import ObjectiveConfig


@dataclass
class Outputs:
    """Backbone outputs of one micro-batch of B images, computed when first read and then shared.

    Crops are ordered crop by crop, as in `Batch`.
    """

    student: VisionTransformer
    teacher: VisionTransformer
    images: Tensor
    """Global crops `[G * B, 3, H, W]`, recoloured and normalised."""
    local_images: Tensor | None
    """Local crops, likewise."""
    plain_images: Tensor | None
    """The global crops larger and not recoloured, normalised."""
    masks: Tensor | None
    """bool `[G * B, patches]`: what of the global crops the student does not see."""
    looking: bool = False
    """Whether objectives shall say how healthy they are."""
    health: dict[str, Tensor] = field(default_factory=dict)
    """What they say, by names that begin with `health_`."""

    @cached_property
    def _student(self) -> list[Features]:
        if self.local_images is None:
            return self.student([self.images], [self.masks])
        return self.student([self.images, self.local_images], [self.masks, None])

    @cached_property
    def student_globals(self) -> Features:
        """Of the global crops, masked where there are masks."""
        return self._student[0]

    @cached_property
    def student_locals(self) -> Features | None:
        """Of the local crops."""
        return self._student[1] if self.local_images is not None else None

    @cached_property
    def teacher_globals(self) -> Features:
        """Of the global crops, never masked, without gradient."""
        with torch.no_grad():
            return self.teacher([self.images])[0]

    def seen_globals(self, of_student: bool) -> Features | None:
        """What student or teacher said of the global crops, if either was asked; the teacher, if there is a choice."""
        if "teacher_globals" in self.__dict__ and not of_student:
            return self.teacher_globals
        return self.student_globals if "_student" in self.__dict__ else None


class Objective(nn.Module):
    """A loss. It knows neither the engine nor the other objectives.

    Args:
        config: its settings.
        student: dimensions of the student's backbone.
        teacher: dimensions of the teacher's.

    Attributes:
        weight: factor of its terms in the sum that is optimised.
    """

    config: ObjectiveConfig

    def __init__(
        self, config: ObjectiveConfig, student: VisionTransformerConfig, teacher: VisionTransformerConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.weight = config.weight

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """Named loss terms, each a scalar before `weight`.

        Args:
            temperature: the teacher's, at this step.
        """
        raise NotImplementedError

    def begin_step(self, step: int, teacher: VisionTransformer) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Called before each optimiser step, from 0 on, on every rank.

        Returns:
            (source, copy) modules: what is to be copied before the step, and where to.
        """
        return iter(())

    def head_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(student, teacher) heads, where it has any of its own."""
        return iter(())

    def last_layers(self) -> Iterator[nn.Module]:
        """Prototype layers, which stay fixed in the first steps."""
        return iter(())
