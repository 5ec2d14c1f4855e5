"""What the losses can be told. Imports no torch, so that `fovea --help` stays quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from infra.config import Config
from pretrain.models.config import HeadConfig

Centering = Literal["softmax", "sinkhorn"]


class DinoConfig(Config):
    """Agreement of class tokens between crops (DINO)."""

    kind: Literal["dino"] = "dino"
    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    head: HeadConfig = HeadConfig()
    """The projection head."""
    centering: Centering = "sinkhorn"
    """How the teacher's targets are balanced."""
    student_temperature: float = Field(0.1, gt=0)
    """Softmax temperature of the student."""


class IbotConfig(Config):
    """Prediction of masked patch tokens (iBOT)."""

    kind: Literal["ibot"] = "ibot"
    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    head: HeadConfig = HeadConfig()
    """The projection head."""
    centering: Centering = "sinkhorn"
    """How the teacher's targets are balanced."""
    student_temperature: float = Field(0.1, gt=0)
    """Softmax temperature of the student."""


class KoleoConfig(Config):
    """Spread of class tokens over the sphere (KoLeo)."""

    kind: Literal["koleo"] = "koleo"
    weight: float = Field(0.1, ge=0)
    """Factor of the loss."""


ObjectiveConfig = Annotated[DinoConfig | IbotConfig | KoleoConfig, Field(discriminator="kind")]
