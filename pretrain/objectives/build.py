"""Objectives by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pretrain.objectives.base import BackboneWidths, Objective
from pretrain.objectives.config import IbotConfig, ObjectiveConfig
from pretrain.objectives.dino import Dino
from pretrain.objectives.gram import Gram
from pretrain.objectives.ibot import Ibot
from pretrain.objectives.image_text import Clip, Siglip
from pretrain.objectives.koleo import Koleo
from pretrain.objectives.mae import Mae
from pretrain.objectives.simmim import Simmim

_KINDS: dict[str, type[Any]] = {
    "dino": Dino,
    "ibot": Ibot,
    "koleo": Koleo,
    "gram": Gram,
    "mae": Mae,
    "simmim": Simmim,
    "clip": Clip,
    "siglip": Siglip,
}


def build_objectives(
    configs: Sequence[ObjectiveConfig], student: BackboneWidths, teacher: BackboneWidths
) -> dict[str, Objective]:
    """The objectives of a run by kind, for a student and a teacher of these dimensions.

    Those that rebuild pixels, and Gram anchoring, take the whole configuration of a Vision Transformer.
    """
    built: dict[str, Objective] = {}
    for config in configs:
        built[config.kind] = _KINDS[config.kind](config, student, teacher)
    for config in configs:
        if isinstance(config, IbotConfig) and config.share_head:
            dino, ibot = built["dino"], built["ibot"]
            assert isinstance(dino, Dino)
            assert isinstance(ibot, Ibot)
            ibot.tie(dino)
    return built
