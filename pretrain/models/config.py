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
    """Axial rotary position embedding (DINOv3)."""

    base: float = Field(100.0, gt=1)
    """Longest period, in units of half the image's side."""
    shift: float = Field(0.0, ge=0)
    """Maximum shift of the coordinates, which run from -1 to 1; drawn for each axis. null: none."""
    jitter: float = Field(1.0, ge=1)
    """Maximum factor of the coordinates, log-uniform between its inverse and itself; drawn for each axis. null: none.
    """
    rescale: float = Field(1.0, ge=1)
    """Maximum factor of the coordinates, log-uniform between its inverse and itself; drawn for both axes together.
    null: none."""


class VisionTransformerConfig(Config):
    """Dimensions and parts of a Vision Transformer, of the DINOv2, DINOv3, DINO, MAE or CLIP family."""

    size: Size | None = None
    """Name of a published size, which sets width, depth, heads and feed-forward network. Other keys override it. null:
    the keys below alone."""
    embed_dim: int = Field(384, ge=8)
    """Width of the token vectors."""
    depth: int = Field(12, ge=1)
    """Number of blocks."""
    num_heads: int = Field(6, ge=1)
    """Attention heads; divides `embed_dim`."""
    patch_size: int = Field(16, ge=2)
    """Side of a patch in pixels."""
    image_size: int = Field(224, ge=8)
    """Side in pixels that the position embedding is made for. It is interpolated for other sides."""
    num_register_tokens: int = Field(0, ge=0)
    """Number of register tokens (arXiv 2309.16588)."""
    pos_embed: Literal["learned", "sincos", "rope"] = "learned"
    """Position embedding: learned (a table), sincos (MAE's fixed one) or rope (DINOv3's axial rotation)."""
    interpolation: Interpolation = "antialias"
    """Bicubic resizing of a position table: antialiased (timm; DINOv2 with registers), with DINOv2's offset of 0.1
    patches (its models without registers), or plain (transformers)."""
    rope: RopeConfig = RopeConfig()
    """Settings of `pos_embed: rope`."""
    ffn_layer: Literal["mlp", "swiglu"] = "mlp"
    """Feed-forward network: mlp (two layers with a GELU) or swiglu (a gated unit of two thirds the width, arXiv
    2002.05202)."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the feed-forward network as a multiple of `embed_dim`. SwiGLU takes two thirds of it."""
    swiglu_multiple: int = Field(8, ge=1)
    """Multiple that SwiGLU's hidden width is rounded up to."""
    qkv_bias: bool = True
    """Add a bias to queries, keys and values."""
    key_bias: bool = True
    """Add a bias to keys. Without rotary positions it cancels in the softmax; large DINOv3 models have none."""
    layer_scale_init: float | None = Field(1e-5, gt=0)
    """Initial value of LayerScale; null: no LayerScale."""
    activation: Activation = "gelu"
    """Activation of `ffn_layer: mlp`: GELU, or the sigmoid approximation of OpenAI's CLIP."""
    pre_norm: bool = False
    """Normalize all tokens before the first block (CLIP)."""
    untie_cls_and_patch_norms: bool = False
    """Give class token and registers a final norm of their own (DINOv3)."""
    untie_global_and_local_cls_norm: bool = False
    """Give class token and registers of local crops a final norm of their own in training (DINOv3)."""
    norm_eps: float = Field(1e-6, gt=0)
    """LayerNorm's epsilon."""
    init: Literal["normal", "xavier"] = "normal"
    """Distribution of the initial weights: normal with `init_std`, truncated at 2, or Xavier's uniform (MAE)."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights. 0.02 suits widths of 768 and more; about 1/sqrt(embed_dim) suits
    narrow ones."""
    drop_path_rate: float = Field(0.0, ge=0, lt=1)
    """Share of each batch that skips a branch in training (stochastic depth)."""
    attention: Backend = "sdpa"
    """Attention kernel: sdpa (PyTorch), xformers (CUDA) or reference (plain operations, for tests)."""

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
    """Name of the network in timm; timm.list_models() lists them."""
    image_size: int | None = Field(None, ge=8)
    """Side in pixels for evaluation and publication. A network of one size resizes crops of other sides to it. null:
    the side of the global crops, or 224 for a network of one size."""

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
    """Parametrize prototypes by a direction and a learned length (DINO, DINOv2); false: by plain weights (DINOv3)."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights of the hidden layers."""
