"""What an objective is: a module that owns its heads and turns backbone outputs into named loss terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from pretrain.data.loader import Batch
from pretrain.models.vit import Features


@dataclass
class Outputs:
    """Backbone outputs of one micro-batch of B images. Crops are ordered crop by crop, as in `Batch`."""

    student_globals: Features
    """Of the 2B global crops, masked where the objectives want it."""
    student_locals: Features | None
    """Of the local crops."""
    teacher_globals: Features
    """Of the 2B global crops, never masked."""


class Objective(nn.Module):
    """A loss. It knows neither the engine nor the other objectives.

    Attributes:
        weight: factor of its terms in the sum that is optimised.
    """

    weight: float

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """Named loss terms, each a scalar before `weight`.

        Args:
            temperature: the teacher's, at this step.
        """
        raise NotImplementedError

    def head_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(student, teacher) heads, where it has any."""
        return iter(())

    def last_layers(self) -> Iterator[nn.Module]:
        """Prototype layers, which stay fixed in the first steps."""
        return iter(())
