"""A backbone as timm knows it: weights, names and `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pretrain.data.config import Views
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.timm_network import Network, TimmNetwork

TRAINING_ONLY = ("mask_token", "local_cls_norm.")


def write(backbone: Network, views: Views, directory: Path) -> None:
    """Write `model.safetensors` and `config.json`."""
    save_file(state_dict(backbone), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config_json(backbone, views), indent=2))


def state_dict(backbone: Network) -> dict[str, Tensor]:
    """Weights under timm's names; what serves training only is left out."""
    if isinstance(backbone, TimmNetwork):
        return {name: value.detach().cpu().contiguous() for name, value in backbone.network.state_dict().items()}
    state = {
        name: value.detach().cpu().contiguous()
        for name, value in backbone.state_dict().items()
        if not name.startswith(TRAINING_ONLY)
    }
    if backbone.config.layer_scale_init is None:  # timm cannot be told to leave it out of every architecture
        ones = torch.ones(backbone.config.embed_dim)
        state |= {f"blocks.{i}.ls{k}.gamma": ones.clone() for i in range(backbone.config.depth) for k in (1, 2)}
    if backbone.config.pos_embed == "rope":
        return _convert_rope(state, backbone.config)
    return _convert_positions(_add_zero_biases(state) if backbone.config.pre_norm else state)


def _add_zero_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Before a first norm timm's patches have no bias: it goes into their positions."""
    table = state["pos_embed"].clone()
    table[:, 1:] += state.pop("patch_embed.proj.bias")
    return state | {"pos_embed": table}


def _convert_positions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm keeps no position for the class token beside registers, so it is added to the token itself."""
    positions = state.pop("pos_embed")
    state["cls_token"] = state["cls_token"] + positions[:, :1]
    state["pos_embed"] = positions[:, 1:].contiguous()
    return state


def _convert_rope(state: dict[str, Tensor], config: VisionTransformerConfig) -> dict[str, Tensor]:
    """timm's Eva: LayerScale is a parameter of the block, biases and SwiGLU's two halves stand alone."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        if name.endswith("qkv.bias"):
            query, _, value_bias = value.chunk(3)
            out[name.replace("qkv.bias", "q_bias")] = query.contiguous()
            out[name.replace("qkv.bias", "v_bias")] = value_bias.contiguous()
        elif config.ffn_layer == "swiglu" and ".fc1." in name:
            gate, linear = value.chunk(2)
            out[name.replace("fc1", "fc1_g")] = gate.contiguous()
            out[name.replace("fc1", "fc1_x")] = linear.contiguous()
        else:
            out[name] = value
    return out


def config_json(backbone: Network, views: Views) -> dict[str, Any]:
    """What `timm.create_model("local-dir:...")` reads."""
    return _network_json(backbone, views) if isinstance(backbone, TimmNetwork) else _vit_json(backbone.config, views)


def _network_json(backbone: TimmNetwork, views: Views) -> dict[str, Any]:
    own, side = backbone.network.pretrained_cfg, backbone.image_size
    return {
        "architecture": backbone.config.name,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "model_args": {"num_classes": 0, **backbone.options},
        "pretrained_cfg": _preprocessing(side, views)
        | {
            "fixed_input_size": not backbone.any_size,
            **{name: own.get(name) for name in ("pool_size", "first_conv", "classifier")},
        },
    }


def _preprocessing(side: int, views: Views) -> dict[str, Any]:
    """How timm prepares images as Fovea does."""
    return {
        "input_size": [3, side, side],
        "interpolation": "bicubic",
        "crop_pct": _crop_share(side),
        "mean": list(views.mean),
        "std": list(views.std),
        "num_classes": 0,
    }


def _vit_json(config: VisionTransformerConfig, views: Views) -> dict[str, Any]:
    architecture, arguments = _rotary_model(config) if config.pos_embed == "rope" else _positioned_model(config)
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": config.embed_dim,
        "global_pool": "token",
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.embed_dim,
            "depth": config.depth,
            "num_heads": config.num_heads,
            "init_values": config.layer_scale_init or 1.0,
            "qkv_bias": config.qkv_bias,
            "global_pool": "token",
            "num_classes": 0,
            "dynamic_img_size": True,
            **arguments,
        },
        "pretrained_cfg": _preprocessing(config.image_size, views)
        | {
            "fixed_input_size": False,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _crop_share(side: int) -> float:
    """What timm divides the side by and rounds down, so that it resizes to the side that `center_crop` does."""
    return side / (round(side * 256 / 224) + 0.25) if side >= 64 else 1.0


# Every dimension of the named architectures is overridden by model_args; they choose the parts.
def _positioned_model(config: VisionTransformerConfig) -> tuple[str, dict[str, Any]]:
    shared = {"reg_tokens": config.num_register_tokens, "no_embed_class": True}
    if config.ffn_layer == "mlp":
        parts: dict[str, Any] = {"mlp_ratio": (config.hidden + 0.5) / config.embed_dim, "pre_norm": config.pre_norm}
        parts |= {} if config.activation == "gelu" else {"act_layer": "quick_gelu"}
        architecture = "vit_base_patch16_224" if config.norm_eps == 1e-6 else "vit_base_patch16_clip_224"
        return architecture, {**shared, **parts}
    return "vit_giant_patch14_dinov2", {**shared, "mlp_ratio": (2 * config.hidden + 0.5) / config.embed_dim}


def _rotary_model(config: VisionTransformerConfig) -> tuple[str, dict[str, Any]]:
    return "vit_small_patch16_dinov3", {
        "num_reg_tokens": config.num_register_tokens,
        "mlp_ratio": (config.hidden + 0.5) / config.embed_dim,
        "swiglu_mlp": config.ffn_layer == "swiglu",
        "swiglu_align_to": 1,
    }
