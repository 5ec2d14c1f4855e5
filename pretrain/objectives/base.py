"""What an objective is: a module that owns its heads and turns backbone outputs into named loss terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from pretrain.data.loader import Batch
from pretrain.models.timm_network import Network
from pretrain.models.vit import Features

TEACHER = "teacher"
"""Name of the teacher whose heads give targets."""


class TeacherOutputs:
    """What teachers say of the global crops: computed when first asked, without gradient, for all who are taught.

    Args:
        teachers: passes by name.
    """

    def __init__(self, teachers: Mapping[str, Callable[[], Features]]) -> None:
        self._teachers = teachers
        self._features: dict[str, Features] = {}
        self._made: dict[str, Tensor] = {}

    @torch.no_grad()
    def features(self, name: str = TEACHER) -> Features:
        """Features of a teacher."""
        if name not in self._features:
            self._features[name] = self._teachers[name]()
        return self._features[name]

    def computed(self) -> Features | None:
        """What the first teacher said, if it was asked."""
        return self._features.get(TEACHER)

    @torch.no_grad()
    def cached(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes of their features, made once for all who ask by the same name."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


@dataclass
class Outputs:
    """Backbone outputs of one micro-batch of B images, computed when first read and then shared.

    Crops are ordered crop by crop, as in `Batch`.
    """

    student: Network
    teachers: TeacherOutputs
    images: Tensor
    """Global crops `[G * B, 3, H, W]`, recolored and normalized."""
    local_images: Tensor | None
    """Local crops, likewise."""
    gram_images: Tensor | None
    """The global crops larger and not recolored, normalized."""
    masks: Tensor | None
    """bool `[G * B, patches]`: what of the global crops the student does not see."""
    collect_metrics: bool = False
    """Whether objectives shall say how healthy they are."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """What they say, by names that begin with `collapse_`."""

    @cached_property
    def _student(self) -> list[Features]:
        if self.local_images is None:
            return self.student([self.images], [self.masks])
        return self.student([self.images, self.local_images], [self.masks, None])

    @cached_property
    def masked_student_globals(self) -> Features:
        """Of the global crops, masked where there are masks."""
        return self._student[0]

    @cached_property
    def student_locals(self) -> Features | None:
        """Of the local crops."""
        return self._student[1] if self.local_images is not None else None

    @property
    def teacher_globals(self) -> Features:
        """Of the global crops, never masked, without gradient."""
        return self.teachers.features()

    def computed_globals(self) -> Features | None:
        """What teacher or student said of the global crops, if either was asked; the teacher, if there is a choice."""
        seen = self.teachers.computed()
        return self.masked_student_globals if seen is None and "_student" in self.__dict__ else seen


class BackboneWidths(Protocol):
    """Of a backbone, as far as most objectives must know it."""

    @property
    def embed_dim(self) -> int:
        """Width of its class token."""

    @property
    def patch_dim(self) -> int:
        """Width of its patch tokens."""


class Objective(nn.Module):
    """A loss. It knows neither the engine nor the other objectives.

    Attributes:
        weight: factor of its terms in the sum that is optimized.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """Named loss terms, each a scalar before `weight`.

        Args:
            temperature: the teacher's, at this step.
        """
        raise NotImplementedError

    def begin_step(self, step: int, teacher: nn.Module | None) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Called before each optimizer step, from 0 on, on every rank.

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
