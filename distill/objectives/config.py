"""What distillation's losses can be told. Imports no torch, so that `fovea --help` stays quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from infra.config import Config
from pretrain.objectives.config import TextTower


class DinoIbotConfig(Config):
    """The teacher's own losses with its heads and settings: DINO, iBOT and KoLeo."""

    kind: Literal["dino_ibot"] = "dino_ibot"
    weight: float = Field(1.0, ge=0)
    """Factor of the losses."""
    patches: Literal["sampled", "all"] = "sampled"
    """Patch tokens that iBOT compares: those that masks would hide (sampled), or all. The student sees all of them."""


class FeaturesConfig(Config):
    """Regression of the teachers' class and patch tokens by a head for each teacher (AM-RADIO, arXiv 2312.06709)."""

    kind: Literal["features"] = "features"
    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    teachers: list[str] = Field(default_factory=list)
    """Names of the teachers to match. Empty: all."""
    cosine: float = Field(0.9, ge=0)
    """Weight of the cosine distance of patch tokens. The loss of class tokens is the cosine distance alone."""
    smooth_l1: float = Field(0.1, ge=0)
    """Weight of the smooth L1 distance of patch tokens."""
    class_weight: float = Field(1.0, ge=0)
    """Factor of the class token's loss."""
    patch_weight: float = Field(1.0, ge=0)
    """Factor of the patch tokens' loss."""
    hidden_dim: int = Field(0, ge=0)
    """Width of the hidden layer of each head. 0: the teacher's width."""
    standardize_images: int = Field(512, ge=0)
    """Number of images from which mean and variance of each teacher channel are estimated before training; channels are
    then standardized. 0: no standardization."""


class GramDistillConfig(Config):
    """Match of the cosine similarities between an image's patch tokens (Gram matrices)."""

    kind: Literal["gram_distill"] = "gram_distill"
    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    teachers: list[str] = Field(default_factory=list)
    """Names of the teachers to match. Empty: all."""


class ClipDistillConfig(Config):
    """CLIP's contrastive loss, and cross-entropy to an open_clip teacher's distributions over the batch (open_clip's
    DistillClipLoss)."""

    kind: Literal["clip_distill"] = "clip_distill"
    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    teacher: str
    """Name of the teacher, of kind open_clip."""
    contrastive_weight: float = Field(1.0, ge=0)
    """Weight of CLIP's contrastive loss."""
    embed_dim: int = Field(512, ge=1)
    """Width of the shared space."""
    text: TextTower = TextTower()
    """Text tower to train."""
    scale: float = Field(14.285714, gt=0)
    """Initial factor of the cosines, the inverse of the temperature. It is learned and at most 100."""


class DeitConfig(Config):
    """Classes, by the corpora's labels and by a classifier of timm (DeiT, arXiv 2012.12877, section 4).

    A Vision Transformer with registers has its first one as distillation token; others use the class token twice.
    """

    kind: Literal["deit"] = "deit"
    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    classifier: str
    """Name of the teaching classifier in timm; its classes are the corpora's."""
    checkpoint: str
    """Path of the classifier's weights."""
    mode: Literal["hard", "soft"] = "hard"
    """Target of the distillation token: the teacher's most likely class (hard) or its distribution (soft)."""
    distillation_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the teacher's part of the loss; the labels have the rest."""
    temperature: float = Field(3.0, gt=0)
    """Softmax temperature of teacher and student in `mode: soft`."""


DistillObjective = Annotated[
    DinoIbotConfig | FeaturesConfig | GramDistillConfig | ClipDistillConfig | DeitConfig,
    Field(discriminator="kind"),
]
