"""A backbone as transformers knows it: ViT, Dinov2, Dinov2WithRegisters or DINOv3ViT, with its image processor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.export.formats.compatibility import family
from distill.export.formats.names import rename_keys
from distill.export.preparation import FILE, image_processor_json
from pretrain.data.config import Views
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.timm_network import Network
from pretrain.models.vit import VisionTransformer

FOLDER = "transformers"

_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
}
_POSITIONED = _EMBEDDINGS | {
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_PLAIN_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_ROTARY = _EMBEDDINGS | {
    "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
}


def write(backbone: Network, views: Views, directory: Path) -> None:
    """Write `transformers/` as `save_pretrained` does, of a backbone that `require_compatible` accepts."""
    import transformers

    assert isinstance(backbone, VisionTransformer)
    config, name = backbone.config, family(backbone.config)
    options = {"add_pooling_layer": False} if name == "ViT" else {}
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**_settings(config)), **options
    )
    model.load_state_dict(state_dict(backbone))
    model.save_pretrained(directory / FOLDER)
    prepared = image_processor_json(config.image_size, views)
    (directory / FOLDER / FILE).write_text(json.dumps(prepared, indent=2))


def state_dict(backbone: VisionTransformer) -> dict[str, Tensor]:
    """Weights under the names of transformers' modules, which keep queries, keys and values apart."""
    config = backbone.config
    rotary, plain = config.pos_embed == "rope", family(config) == "ViT"
    names = _ROTARY if rotary else _POSITIONED
    state = _layers(
        dict(backbone.state_dict()), "layers" if plain else "model.layer" if rotary else "encoder.layer", config
    )
    state = _rename_gated(state) if config.ffn_layer == "swiglu" else _split_projections(state) if rotary else state
    state = _rename_plain(state) if plain else state
    state = {name: value for name, value in state.items() if not name.startswith("local_cls_norm.")}
    if rotary:
        state["mask_token"] = state["mask_token"][None]
        state.setdefault("reg_token", torch.zeros(1, 0, config.embed_dim))
        if not config.key_bias:
            state = {name: value for name, value in state.items() if not name.endswith("k_proj.bias")}
    return {names.get(name, name): value.detach().cpu().contiguous() for name, value in state.items()}


def _layers(state: dict[str, Tensor], layers: str, config: VisionTransformerConfig) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        name = re.sub(r"^blocks\.", f"{layers}.", name)
        name = re.sub(r"ls(\d)\.gamma", r"layer_scale\1.lambda1", name).replace("attn.proj.", "attention.o_proj.")
        if ".attn.qkv." in name:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("attn.qkv.", f"attention.{part}_proj.")] = chunk
        else:
            out[name] = value
    if config.layer_scale_init is None and family(config) != "ViT":  # others have one in every block
        ones = torch.ones(config.embed_dim)
        out |= {f"{layers}.{i}.layer_scale{k}.lambda1": ones.clone() for i in range(config.depth) for k in (1, 2)}
    return out


def _rename_plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ViT has no mask token, and other names for a block's norms."""
    return {rename_keys(name, _PLAIN_NORMS): value for name, value in state.items() if name != "mask_token"}


def _rename_gated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, value in state.items():
        if ".fc1." in name:
            gate, linear = value.chunk(2)
            out[name.replace("fc1", "gate_proj")], out[name.replace("fc1", "up_proj")] = gate, linear
        else:
            out[name.replace("fc2", "down_proj") if ".fc2." in name else name] = value
    return out


def _split_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("fc1", "up_proj").replace("fc2", "down_proj"): value for name, value in state.items()}


def _shared(config: VisionTransformerConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.norm_eps,
    }


def _scale(config: VisionTransformerConfig) -> dict[str, float]:
    return {"layerscale_value": config.layer_scale_init or 1.0}


def _settings(config: VisionTransformerConfig) -> dict[str, Any]:
    if family(config) == "ViT":
        plain = {"intermediate_size": config.hidden, "hidden_act": "gelu", "qkv_bias": config.qkv_bias}
        return _shared(config) | plain
    return _rotary_settings(config) if config.pos_embed == "rope" else _positioned_settings(config)


def _positioned_settings(config: VisionTransformerConfig) -> dict[str, Any]:
    gated = config.ffn_layer == "swiglu"
    settings = _shared(config) | _scale(config) | {"qkv_bias": config.qkv_bias, "use_swiglu_ffn": gated}
    settings |= {"mlp_ratio": int(config.mlp_ratio)}
    return settings | ({"num_register_tokens": config.num_register_tokens} if config.num_register_tokens else {})


def _rotary_settings(config: VisionTransformerConfig) -> dict[str, Any]:
    gated = config.ffn_layer == "swiglu"
    return {
        **_shared(config),
        **_scale(config),
        "num_register_tokens": config.num_register_tokens,
        "intermediate_size": config.hidden,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "rope_theta": config.rope.base,
        "pos_embed_shift": config.rope.shift or None,
        "pos_embed_jitter": config.rope.jitter if config.rope.jitter > 1 else None,
        "pos_embed_rescale": config.rope.rescale if config.rope.rescale > 1 else None,
        "query_bias": config.qkv_bias,
        "key_bias": config.qkv_bias and config.key_bias,
        "value_bias": config.qkv_bias,
    }
