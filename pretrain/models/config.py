"""Dimensions of backbones and heads. Imports no torch, so that `fovea --help` stays quick."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from infra.config import Config

Backend = Literal["sdpa", "xformers", "reference"]
Interpolation = Literal["antialias", "offset", "plain"]
Activation = Literal["gelu", "quick_gelu"]
Checkpointing = Literal["none", "selective", "full"]
Size = Literal["tiny", "small", "base", "large", "so400m", "huge", "giant", "7b"]

# Widths, depths and heads as published: DeiT (tiny), ViT (small to huge), DINOv2 (giant), DINOv3 (so400m, 7b).
SIZES: dict[Size, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "so400m": {"embed_dim": 1152, "depth": 27, "num_heads": 18, "mlp_ratio": 3.777777778},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1536, "depth": 40, "num_heads": 24, "ffn_layer": "swiglu"},
    "7b": {
        "embed_dim": 4096,
        "depth": 40,
        "num_heads": 32,
        "ffn_layer": "swiglu",
        "mlp_ratio": 3.0,
        "swiglu_multiple": 64,
        "qkv_bias": False,
    },
}


class RopeConfig(Config):
    """Axial rotary position embedding and its augmentation in training (DINOv3, arXiv 2508.10104, section 3.2)."""

    base: float = Field(100.0, gt=1)
    """Longest period, in units of half the image's side."""
    shift: float = Field(0.0, ge=0)
    """Coordinates, -1 to 1, are shifted by up to this, each axis by itself."""
    jitter: float = Field(1.0, ge=1)
    """Coordinates are scaled by a log-uniform factor up to this or its inverse, each axis by itself."""
    rescale: float = Field(1.0, ge=1)
    """Coordinates are scaled by a log-uniform factor up to this or its inverse, both axes together."""


class VisionTransformerConfig(Config):
    """Dimensions and parts of a Vision Transformer, of the DINOv2, DINOv3, DINO, MAE or CLIP family."""

    size: Size | None = None
    """Takes width, depth, heads and feed-forward network of a published size; other keys win over it."""
    embed_dim: int = Field(384, ge=8)
    """Width of the token vectors."""
    depth: int = Field(12, ge=1)
    """Number of blocks."""
    num_heads: int = Field(6, ge=1)
    """Attention heads; divides `embed_dim`."""
    patch_size: int = Field(16, ge=2)
    """Side of a patch in pixels."""
    image_size: int = Field(224, ge=8)
    """Side in pixels for which the position embedding is made; it is interpolated for others."""
    num_register_tokens: int = Field(0, ge=0)
    """Register tokens (arXiv 2309.16588)."""
    pos_embed: Literal["learned", "sincos", "rope"] = "learned"
    """Position of patches: a learned table, MAE's fixed sines and cosines, or DINOv3's axial rotation."""
    interpolation: Interpolation = "antialias"
    """How a position table is resized, bicubically: antialiased (timm; DINOv2 with registers), with DINOv2's offset of
    0.1 patches (its models without registers), or plainly (transformers)."""
    rope: RopeConfig = RopeConfig()
    """Of `position: rope`."""
    ffn_layer: Literal["mlp", "swiglu"] = "mlp"
    """Feed-forward network: two layers with a GELU, or a gated unit of two thirds the width (arXiv 2002.05202)."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the feed-forward network as a multiple of `embed_dim`; SwiGLU takes two thirds of it."""
    swiglu_multiple: int = Field(8, ge=1)
    """SwiGLU's hidden width is rounded up to a multiple of this."""
    qkv_bias: bool = True
    """Queries, keys and values have a bias."""
    key_bias: bool = True
    """Keys have a bias of their own. Without rotary positions it cancels in the softmax; large DINOv3 has none."""
    layer_scale_init: float | None = Field(1e-5, gt=0)
    """Initial value of LayerScale; null: no LayerScale."""
    activation: Activation = "gelu"
    """Of the two-layer feed-forward network: GELU, or the sigmoid that OpenAI's CLIP has in its place."""
    pre_norm: bool = False
    """All tokens are normed before the first block (CLIP)."""
    untie_cls_and_patch_norms: bool = False
    """Class token and registers have a final norm of their own (DINOv3)."""
    untie_global_and_local_cls_norm: bool = False
    """Class token and registers of local crops have a final norm of their own in training (DINOv3)."""
    norm_eps: float = Field(1e-6, gt=0)
    """LayerNorm's epsilon."""
    init: Literal["normal", "xavier"] = "normal"
    """Initial weights: normal of `init_std`, cut at 2, or Xavier's uniform (MAE)."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights. 0.02 suits a width of 768 and more; about 1/sqrt(dim) narrow ones."""
    drop_path_rate: float = Field(0.0, ge=0, lt=1)
    """Share of each batch that skips a branch in training (stochastic depth)."""
    attention: Backend = "sdpa"
    """Kernel: sdpa (PyTorch), xformers (CUDA) or reference (plain, for tests)."""

    @model_validator(mode="before")
    @classmethod
    def _take_size(cls, values: Any) -> Any:
        """Spell a size out, so that the recorded settings hold dimensions alone."""
        if not isinstance(values, dict) or values.get("size") not in SIZES:
            return values
        return SIZES[values["size"]] | {key: value for key, value in values.items() if key != "size"}

    @model_validator(mode="after")
    def _divides(self) -> VisionTransformerConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is no multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.pos_embed != "learned" and self.embed_dim // self.num_heads % 4:
            raise ValueError(
                f"pos_embed {self.pos_embed} needs a head width, embed_dim / num_heads, that is a multiple of 4"
            )
        return self

    @property
    def patch_dim(self) -> int:
        """Width of the patch tokens."""
        return self.embed_dim

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward network."""
        if self.ffn_layer == "mlp":
            return int(self.embed_dim * self.mlp_ratio)
        narrowed = int(int(self.embed_dim * self.mlp_ratio) * 2 / 3)
        return -(-narrowed // self.swiglu_multiple) * self.swiglu_multiple


class TimmNetworkConfig(Config):
    """A network of timm, without its classifier, with the initial weights that timm gives it."""

    name: str
    """Its name in timm; timm.list_models() has them."""
    image_size: int | None = Field(None, ge=8)
    """Side in pixels at which it is evaluated and published. Crops of other sides are resized to it where it takes no
    other. null: that of the global crops if it takes any side, else 224."""

    @property
    def registers(self) -> int:
        """None that can be told from others."""
        return 0


ModelConfig = VisionTransformerConfig | TimmNetworkConfig


class HeadConfig(Config):
    """A DINO projection head."""

    hidden_dim: int = Field(2048, ge=1)
    """Width of the two hidden layers."""
    bottleneck_dim: int = Field(256, ge=1)
    """Width of the normalized vector before the prototypes."""
    num_prototypes: int = Field(65536, ge=2)
    """Number of prototypes, K."""
    weight_norm: bool = True
    """Prototypes are a direction and a learned length (DINO, DINOv2), or plain weights (DINOv3)."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights of the hidden layers."""
