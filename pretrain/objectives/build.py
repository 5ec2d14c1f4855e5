"""Objectives by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pretrain.objectives.base import Objective
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.dino import Dino
from pretrain.objectives.ibot import Ibot
from pretrain.objectives.koleo import Koleo

_KINDS: dict[str, type[Any]] = {"dino": Dino, "ibot": Ibot, "koleo": Koleo}


def build(configs: Sequence[ObjectiveConfig], dim: int, teacher_dim: int) -> dict[str, Objective]:
    """The objectives of a run by kind, for a student and a teacher of these widths."""
    return {config.kind: _KINDS[config.kind](config, dim, teacher_dim) for config in configs}
