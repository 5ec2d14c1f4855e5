"""Which backbones each format can hold, by their settings alone: told before any weights are read."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence

from distill.config import FormatName
from infra.errors import UserError
from pretrain.models.config import ModelConfig, TimmNetworkConfig, VisionTransformerConfig
from pretrain.objectives.config import ClipConfig, ObjectiveConfig, SiglipConfig, TextTower

_PACKAGES: dict[FormatName, tuple[str, ...]] = {
    "transformers": ("transformers",),
    "onnx": ("onnxruntime", "onnxscript"),
}
_TOOLS = {"official": "the official code"}
_OF_ANY_NETWORK: set[FormatName] = {"timm", "torch_hub", "onnx", "torch_export"}
_ON_TIMM: set[FormatName] = {"timm", "torch_hub", "onnx", "torch_export"}
"""They hold timm's model."""


def require_compatible(name: FormatName, model: ModelConfig, objectives: Sequence[ObjectiveConfig]) -> None:
    """Check that a backbone can be published in a format.

    Args:
        model: settings of the backbone.
        objectives: those whose heads are in its checkpoint.

    Raises:
        UserError: the format's packages are missing, or it has no such model.
    """
    for package in _PACKAGES.get(name, ()):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"formats: {name} needs the package {package}; pip install 'fovea[publish]'")
    reason = incompatibility(name, model, objectives)
    if reason is not None:
        raise UserError(f"formats: {reason}; leave {name} out")


def incompatibility(name: FormatName, model: ModelConfig, objectives: Sequence[ObjectiveConfig]) -> str | None:
    """Why a format cannot hold a backbone; None where it can."""
    tool = "timm" if name in _ON_TIMM else _TOOLS.get(name, name)
    text = next((each.text for each in objectives if isinstance(each, ClipConfig | SiglipConfig)), None)
    if name == "open_clip" and text is None:
        return "open_clip is for models that were trained with captions (objective clip or siglip)"
    if isinstance(model, TimmNetworkConfig):
        return None if name in _OF_ANY_NETWORK else f"{tool} has no model like {model.name}"
    for key, value in _departures(name, model, text):
        return f"model.{key} {value}: {tool} has no such model"
    return None


def family(model: VisionTransformerConfig) -> str:
    """What transformers' classes of such a model are named by: without LayerScale and registers it is a plain ViT."""
    if model.pos_embed == "rope":
        return "DINOv3ViT"
    if model.layer_scale_init is None and not model.num_register_tokens and model.ffn_layer == "mlp":
        return "ViT"
    return "Dinov2WithRegisters" if model.num_register_tokens else "Dinov2"


def _departures(
    name: FormatName, model: VisionTransformerConfig, text: TextTower | None
) -> Iterator[tuple[str, object]]:
    """Settings of a model that a format cannot hold, with their values."""
    for key, departs in _DEPARTURES[name](model, text).items():
        if departs:
            value: object = model
            for part in key.split("."):
                value = getattr(value, part)
            yield key, value


def _of_timm(model: VisionTransformerConfig, text: TextTower | None) -> dict[str, bool]:
    rotary, gated = model.pos_embed == "rope", model.ffn_layer == "swiglu"
    return {
        "untie_cls_and_patch_norms": model.untie_cls_and_patch_norms,
        "norm_eps": model.norm_eps not in ((1e-5,) if rotary else (1e-6,) if gated else (1e-6, 1e-5)),
        "pre_norm": model.pre_norm and (rotary or gated),
        "activation": model.activation != "gelu" and rotary,
        "key_bias": rotary and model.qkv_bias and model.key_bias,
        "rope.base": rotary and model.rope.base != 100,
    }


def _of_transformers(model: VisionTransformerConfig, text: TextTower | None) -> dict[str, bool]:
    shared, gated = family(model).startswith("Dinov2"), model.ffn_layer == "swiglu"
    return {
        "untie_cls_and_patch_norms": model.untie_cls_and_patch_norms,
        "pre_norm": model.pre_norm,
        "activation": model.activation != "gelu",
        "swiglu_multiple": gated and shared and model.swiglu_multiple != 8,
        "mlp_ratio": shared and model.mlp_ratio != int(model.mlp_ratio),
    }


def _of_open_clip(model: VisionTransformerConfig, text: TextTower | None) -> dict[str, bool]:
    return {
        "num_register_tokens": model.num_register_tokens > 0,
        "pos_embed": model.pos_embed == "rope",
        "ffn_layer": model.ffn_layer == "swiglu",
        "untie_cls_and_patch_norms": model.untie_cls_and_patch_norms,
        "activation": text is not None and model.activation != text.activation,
    }


def _of_official(model: VisionTransformerConfig, text: TextTower | None) -> dict[str, bool]:
    return {"pre_norm": model.pre_norm, "activation": model.activation != "gelu"}


_DEPARTURES = {
    **dict.fromkeys(sorted(_ON_TIMM), _of_timm),
    "transformers": _of_transformers,
    "open_clip": _of_open_clip,
    "official": _of_official,
}
