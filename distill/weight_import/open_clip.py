"""open_clip's CLIP models as checkpoints: the image tower as our Vision Transformer, the text tower as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.export.formats.names import rename_keys
from distill.export.formats.open_clip_folder import IN_BLOCKS
from infra.errors import UserError
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.official import require_matching_shapes
from pretrain.objectives.config import ClipConfig, SiglipConfig, TextTower

_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
_NAMES = {theirs: ours for ours, theirs in IN_BLOCKS.items()}


@dataclass(frozen=True)
class KnownModel:
    """What open_clip's configuration of a model comes to here."""

    model: VisionTransformerConfig
    objective: ClipConfig | SiglipConfig


def find_known(name: str) -> KnownModel:
    """A model by its name in open_clip.

    Raises:
        UserError: open_clip has none of that name, or ours has not its parts.
    """
    import open_clip

    settings = open_clip.get_model_config(name)
    if settings is None:
        raise UserError(f"name: {name} is none of open_clip's models; open_clip.list_models() has the names")
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    foreign = ("timm_model_name", "attentional_pool", "patch_dropout", "block_type", "final_ln_after_pool")
    odd = [key for key in foreign if vision.get(key)] + [key for key in ("hf_model_name",) if text.get(key)]
    pools = (vision.get("pool_type", "tok"), text.get("pool_type", "argmax"))
    odd += ["another pool_type"] if pools != ("tok", "argmax") else []
    odd += ["the layers of a ResNet"] if not isinstance(vision.get("layers", 12), int) else []
    if odd:
        raise UserError(
            f"name: {name} has {odd[0]}, which no Vision Transformer of ours has; evaluate or teach with it"
        )
    quick = bool(settings.get("quick_gelu", False))
    return KnownModel(_vision(vision, quick), _objective(settings, text, quick))


def _vision(vision: Mapping[str, Any], quick: bool) -> VisionTransformerConfig:
    width = vision.get("width", 768)
    return VisionTransformerConfig(
        embed_dim=width,
        depth=vision.get("layers", 12),
        num_heads=width // vision.get("head_width", 64),
        patch_size=vision.get("patch_size", 16),
        image_size=vision.get("image_size", 224),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        layer_scale_init=vision.get("ls_init_value"),
        norm_eps=(vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        pre_norm=not vision.get("no_ln_pre", False),
        activation="quick_gelu" if quick else "gelu",
    )


def _objective(settings: Mapping[str, Any], text: Mapping[str, Any], quick: bool) -> ClipConfig | SiglipConfig:
    tower = TextTower(
        context=text.get("context_length", 77),
        width=text.get("width", 512),
        num_heads=text.get("heads", 8),
        layers=text.get("layers", 12),
        activation="quick_gelu" if quick else "gelu",
    )
    kind = SiglipConfig if "init_logit_bias" in settings else ClipConfig
    return kind(embed_dim=settings["embed_dim"], text=tower)


def extract_backbone(state: Mapping[str, Tensor], config: VisionTransformerConfig) -> dict[str, Tensor]:
    """The image tower's weights under our names.

    Raises:
        UserError: they are of another model.
    """
    try:
        out = {
            "patch_embed.proj.weight": state["visual.conv1.weight"],
            "patch_embed.proj.bias": torch.zeros(config.embed_dim),
            "cls_token": state["visual.class_embedding"].reshape(1, 1, -1),
            "pos_embed": state["visual.positional_embedding"][None],
            "norm.weight": state["visual.ln_post.weight"],
            "norm.bias": state["visual.ln_post.bias"],
            "mask_token": torch.zeros(1, config.embed_dim),
        }
    except KeyError as error:
        raise UserError(f"has no {error.args[0]}; is it open_clip's?") from None
    for name, value in state.items():
        if name.startswith("visual.ln_pre."):
            out[name.replace("visual.ln_pre", "norm_pre")] = value
        elif name.startswith("visual.transformer.resblocks."):
            out["blocks." + rename_keys(name.removeprefix("visual.transformer.resblocks."), _NAMES)] = value
    require_matching_shapes(out, config)
    return out


def extract_towers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the objective: projection, scale, and the text tower, wherever the file has it.

    Raises:
        UserError: it has none.
    """
    missing = [name for name in ("visual.proj", "logit_scale") if name not in state]
    if missing:
        raise UserError(f"has no {missing[0]}; is it a whole model of open_clip's?")
    text = {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
    text = text or {name: value for name, value in state.items() if name.startswith(_TEXT)}
    out = {f"text.{name}": value for name, value in text.items() if name != "attn_mask"}
    out["project.weight"] = state["visual.proj"].T
    out["logit_scale"] = state["logit_scale"].reshape(1)
    return out | ({"logit_bias": state["logit_bias"].reshape(1)} if "logit_bias" in state else {})
