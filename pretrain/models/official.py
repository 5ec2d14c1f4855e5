"""Weights under the key names of the official DINOv2 and DINOv3 checkpoints, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from infra.errors import UserError
from pretrain.models.config import VisionTransformerConfig

Family = Literal["dinov2", "dinov3"]

_REGISTERS: dict[Family, str] = {"dinov2": "register_tokens", "dinov3": "storage_tokens"}
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")  # FSDP training of DINOv2 nests blocks in chunks
_DERIVED = ("rope_embed.", "qkv.bias_mask")  # buffers that follow from the configuration


def family_of(config: VisionTransformerConfig) -> Family:
    """Rotary positions are DINOv3's, a table is DINOv2's."""
    return "dinov3" if config.pos_embed == "rope" else "dinov2"


def to_official(state: Mapping[str, Tensor], config: VisionTransformerConfig) -> dict[str, Tensor]:
    """Our state dict as the official code loads it, strictly."""
    family = family_of(config)
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.replace("reg_token", _REGISTERS[family])
        if config.ffn_layer == "swiglu" and ".mlp." in name:
            out |= _split_gate(name, value) if family == "dinov3" else {_rename_gate(name): value}
        else:
            out[name] = value
        if family == "dinov3" and name.endswith("qkv.bias") and not config.key_bias:
            out[f"{name}_mask"] = _bias_mask(value)
    if family == "dinov3":
        half = config.embed_dim // config.num_heads // 2
        out["rope_embed.periods"] = config.rope.base ** (torch.arange(half // 2) / (half / 2))
    return out


def from_official(state: Mapping[str, Tensor], config: VisionTransformerConfig) -> dict[str, Tensor]:
    """The official state dict, of a hub file or of a training's teacher, as ours.

    Raises:
        UserError: tensors are missing, of another shape, or of no place in a model of this configuration.
    """
    family = family_of(config)
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _CHUNKED.sub(r"blocks.\1.", key.removeprefix("teacher.").removeprefix("backbone."))
        if name.startswith(("dino_head.", "ibot_head.")) or any(part in name for part in _DERIVED):
            continue
        if f"{key}_mask" in state:  # a masked key bias may hold anything
            value = value * state[f"{key}_mask"].nan_to_num(1).ne(0)
        name = name.replace(_REGISTERS[family], "reg_token")
        if config.ffn_layer == "swiglu" and ".mlp." in name:
            name = name.replace(".w12.", ".fc1.").replace(".w3.", ".fc2.")
        out[name] = value
    _join_gates(out)
    require_matching_shapes(out, config)
    return out


def _rename_gate(name: str) -> str:
    return name.replace(".fc1.", ".w12.").replace(".fc2.", ".w3.")


def _split_gate(name: str, value: Tensor) -> dict[str, Tensor]:
    if ".fc2." in name:
        return {name.replace(".fc2.", ".w3."): value}
    gate, linear = value.chunk(2)
    return {name.replace(".fc1.", ".w1."): gate.clone(), name.replace(".fc1.", ".w2."): linear.clone()}


def _join_gates(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if ".w1." in name and name.replace(".w1.", ".w2.") in state]:
        gate, linear = state.pop(name), state.pop(name.replace(".w1.", ".w2."))
        state[name.replace(".w1.", ".fc1.")] = torch.cat([gate, linear])


def _bias_mask(bias: Tensor) -> Tensor:
    query, key, value = torch.ones_like(bias).chunk(3)
    return torch.cat([query, torch.zeros_like(key), value])


def require_matching_shapes(state: Mapping[str, Tensor], config: VisionTransformerConfig) -> None:
    """Check that a state dict is whole and of a model of this configuration.

    Raises:
        UserError: tensors are missing, of another shape, or of no place in it.
    """
    from pretrain.models.vit import VisionTransformer

    with torch.device("meta"):
        wanted = {name: value.shape for name, value in VisionTransformer(config).state_dict().items()}
    for name, shape in wanted.items():
        if name not in state:
            raise UserError(f"has no {name}; choose the model settings it was trained with")
        if state[name].shape != shape:
            raise UserError(f"{name} is {list(state[name].shape)}, the model settings ask for {list(shape)}")
    if extra := sorted(set(state) - set(wanted)):
        raise UserError(f"{extra[0]} has no place in the model settings")
