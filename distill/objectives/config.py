"""What distillation's losses can be told. Imports no torch, so that `fovea --help` stays quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from infra.config import Config
from pretrain.objectives.config import TextTower


class DinoIbotConfig(Config):
    """The teacher's own losses, by its own heads: DINO, iBOT, KoLeo, with the settings that it was trained with."""

    kind: Literal["dino_ibot"] = "dino_ibot"
    weight: float = Field(1.0, ge=0)
    """Factor of the losses."""
    patches: Literal["sampled", "all"] = "sampled"
    """Patch tokens that iBOT compares: as many as masks would hide, at their places, or all. None is hidden."""


class FeaturesConfig(Config):
    """Class and patch tokens that, by a head for each teacher, are the teachers' (AM-RADIO, arXiv 2312.06709)."""

    kind: Literal["features"] = "features"
    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    teachers: list[str] = Field(default_factory=list)
    """Names of the teachers that are compared with; none: all."""
    cosine: float = Field(0.9, ge=0)
    """Share of the cosine distance in the loss of patch tokens. Class tokens have no other."""
    smooth_l1: float = Field(0.1, ge=0)
    """Share of the smooth L1 distance."""
    class_weight: float = Field(1.0, ge=0)
    """Factor of the class token's loss."""
    patch_weight: float = Field(1.0, ge=0)
    """Factor of the patch tokens' loss."""
    hidden_dim: int = Field(0, ge=0)
    """Width of the hidden layer of each head; 0: as wide as the teacher."""
    standardize_images: int = Field(512, ge=0)
    """Give each channel of a teacher mean 0 and variance 1, by what it says of this many images before the training
    begins, so that no teacher and no channel is louder than others; 0: leave them as they are."""


class GramDistillConfig(Config):
    """Likeness of an image's patch tokens to each other that is the teacher's (Gram matrices of cosines)."""

    kind: Literal["gram_distill"] = "gram_distill"
    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    teachers: list[str] = Field(default_factory=list)
    """Names of the teachers that are compared with; none: all."""


class ClipDistillConfig(Config):
    """Images and captions told apart as an open_clip model does: CLIP's contrast, and cross-entropy to the teacher's
    distributions over the batch (open_clip's DistillClipLoss)."""

    kind: Literal["clip_distill"] = "clip_distill"
    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    teacher: str
    """Name of the teacher, of kind open_clip."""
    contrastive_weight: float = Field(1.0, ge=0)
    """Share of CLIP's own loss."""
    embed_dim: int = Field(512, ge=1)
    """Width of the shared space."""
    text: TextTower = TextTower()
    """The text tower that is trained."""
    scale: float = Field(14.285714, gt=0)
    """First factor of the cosines, the inverse of the temperature; learned, at most 100."""


class DeitConfig(Config):
    """Classes, by the corpora's labels and by a classifier of timm (DeiT, arXiv 2012.12877, section 4).

    A Vision Transformer with registers has its first one as distillation token; others use the class token twice.
    """

    kind: Literal["deit"] = "deit"
    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    classifier: str
    """Name in timm of the network that teaches; its classes are the corpora's."""
    checkpoint: str
    """Path of its weights on this machine, classifier included."""
    mode: Literal["hard", "soft"] = "hard"
    """The distillation token learns the teacher's likeliest class, or all of its distribution."""
    distillation_weight: float = Field(0.5, ge=0, le=1)
    """Share of the teacher's part in the loss; the labels have the rest."""
    temperature: float = Field(3.0, gt=0)
    """Softmax temperature of teacher and student where `mode` is soft."""


DistillObjective = Annotated[
    DinoIbotConfig | FeaturesConfig | GramDistillConfig | ClipDistillConfig | DeitConfig,
    Field(discriminator="kind"),
]
