"""A backbone as timm knows it: weights, names and `config.json`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pretrain.config import Views
from pretrain.models.vit import VisionTransformer

_ARCHITECTURE = "vit_base_patch16_224"  # every dimension is overridden by model_args


def state_dict(backbone: VisionTransformer) -> dict[str, Tensor]:
    """Weights under timm's names.

    timm keeps no position for the class token beside registers, so it is added to the token itself; the mask token
    serves training only.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    positions = state.pop("pos_embed")
    state.pop("mask_token")
    state["cls_token"] = state["cls_token"] + positions[:, :1]
    state["pos_embed"] = positions[:, 1:].contiguous()
    return state


def config_json(backbone: VisionTransformer, views: Views) -> dict[str, Any]:
    """What `timm.create_model("local-dir:...")` reads."""
    config = backbone.config
    return {
        "architecture": _ARCHITECTURE,
        "num_classes": 0,
        "num_features": config.dim,
        "global_pool": "token",
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.dim,
            "depth": config.depth,
            "num_heads": config.heads,
            "mlp_ratio": config.mlp_ratio,
            "init_values": config.layer_scale,
            "reg_tokens": config.registers,
            "no_embed_class": True,
            "global_pool": "token",
            "num_classes": 0,
            "dynamic_img_size": True,
        },
        "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 0.875 if config.image_size >= 64 else 1.0,
            "mean": list(views.mean),
            "std": list(views.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
