"""What the losses can be told. Imports no torch, so that `fovea --help` stays quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from infra.config import Config
from pretrain.models.config import Activation, HeadConfig

Centering = Literal["softmax", "sinkhorn"]


class PrototypeConfig(Config):
    """What DINO and iBOT share."""

    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    head: HeadConfig = HeadConfig()
    """The projection head."""
    centering: Centering = "sinkhorn"
    """Method that balances the teacher's targets."""
    student_temperature: float = Field(0.1, gt=0)
    """Softmax temperature of the student."""


class DinoConfig(PrototypeConfig):
    """Agreement of class tokens between crops (DINO)."""

    kind: Literal["dino"] = "dino"
    local_weight: float = Field(1.0, ge=0)
    """Share of the loss that local crops contribute."""


class IbotConfig(PrototypeConfig):
    """Prediction of masked patch tokens (iBOT)."""

    kind: Literal["ibot"] = "ibot"
    share_head: bool = False
    """Share DINO's heads; `head` is then not read."""
    normalize_by: Literal["masked", "all"] = "masked"
    """Divisor of the loss: the number of masked crops, or of all global crops, as in DINOv2."""


class KoleoConfig(Config):
    """Spread of class tokens over the sphere (KoLeo)."""

    kind: Literal["koleo"] = "koleo"
    weight: float = Field(0.1, ge=0)
    """Factor of the loss."""
    distributed: bool = False
    """Search nearest neighbors among the crops of all ranks (DINOv3) instead of each rank's own."""
    half_precision: bool = False
    """Compute in bf16 when the training does, as DINOv2 does in fp16. Distances can then be zero."""


class GramConfig(Config):
    """Gram anchoring: likeness between patch tokens stays that of an earlier teacher (DINOv3, section 4.2)."""

    kind: Literal["gram"] = "gram"
    weight: float = Field(2.0, ge=0)
    """Factor of the loss."""
    start_step: int = Field(0, ge=0)
    """First step of the loss. The teacher at that step becomes the anchor."""
    update_every: int = Field(10_000, ge=1)
    """Steps after which the current teacher becomes the anchor."""
    max_updates: int = Field(3, ge=0)
    """Maximum number of anchor updates after the first anchor."""


class MaeConfig(Config):
    """Masked autoencoding (MAE): pixels of hidden patches from the visible ones."""

    kind: Literal["mae"] = "mae"
    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of masked patches."""
    embed_dim: int = Field(512, ge=8)
    """Width of the decoder."""
    depth: int = Field(8, ge=1)
    """Blocks of the decoder."""
    num_heads: int = Field(16, ge=1)
    """Attention heads of the decoder."""
    normalize_pixels: bool = True
    """Normalize the target pixels of each patch to mean 0 and variance 1."""

    @model_validator(mode="after")
    def _divides(self) -> MaeConfig:
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise ValueError(f"embed_dim {self.embed_dim} is no multiple of 4 and of num_heads {self.num_heads}")
        return self


class SimmimConfig(Config):
    """Pixels of masked patch tokens by one linear layer (SimMIM)."""

    kind: Literal["simmim"] = "simmim"
    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""


class TextTower(Config):
    """open_clip's text transformer, behind its byte-pair tokenizer."""

    context: int = Field(77, ge=4)
    """Maximum number of tokens of a caption; longer captions are truncated."""
    width: int = Field(512, ge=8)
    """Width of the token vectors."""
    num_heads: int = Field(8, ge=1)
    """Attention heads."""
    layers: int = Field(12, ge=1)
    """Number of blocks."""
    activation: Activation = "gelu"
    """Activation of the feed-forward networks: GELU, or the sigmoid approximation of OpenAI's CLIP."""

    @model_validator(mode="after")
    def _divides(self) -> TextTower:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is no multiple of num_heads {self.num_heads}")
        return self


class ImageTextConfig(Config):
    """What CLIP and SigLIP share."""

    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    embed_dim: int = Field(512, ge=1)
    """Width of the shared space."""
    text: TextTower = TextTower()
    """The text tower."""


class ClipConfig(ImageTextConfig):
    """Contrast of images and captions over all pairs of a micro-batch, of all ranks (CLIP's InfoNCE)."""

    kind: Literal["clip"] = "clip"
    scale: float = Field(14.285714, gt=0)
    """Initial factor of the cosines, the inverse of the temperature. It is learned and at most 100."""


class SiglipConfig(ImageTextConfig):
    """Each image with each caption, true or not, by itself (SigLIP)."""

    kind: Literal["siglip"] = "siglip"
    scale: float = Field(10.0, gt=0)
    """Initial factor of the cosines. It is learned."""
    bias: float = -10.0
    """Initial bias of the scaled cosines. It is learned."""


ObjectiveConfig = Annotated[
    DinoConfig | IbotConfig | KoleoConfig | GramConfig | MaeConfig | SimmimConfig | ClipConfig | SiglipConfig,
    Field(discriminator="kind"),
]
