"""A CLIP model as open_clip knows it: `open_clip_config.json` and weights, for `local-dir:`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.export.formats.names import rename_keys
from distill.export.formats.source import PublishSource
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.image_text import ImageText, Siglip, tokenizer

FOLDER = "open_clip"
CAPTIONS = ("a photo", "two words of a caption")
"""Texts that are compared, beside images, when it is checked."""


def write(material: PublishSource, directory: Path) -> None:
    """Write `open_clip/`, of a backbone that `require_compatible` accepts."""
    backbone, towers = material.backbone, material.towers
    assert isinstance(backbone, VisionTransformer)
    assert towers is not None
    folder = directory / FOLDER
    folder.mkdir()
    save_file(state_dict(backbone, towers), folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    settings = {"model_cfg": _model(backbone.config, towers), "preprocess_cfg": _preparation(material)}
    (folder / "open_clip_config.json").write_text(json.dumps(settings, indent=2))


def features(material: PublishSource, pixels: Tensor) -> np.ndarray:
    """What a fresh process is to give of images and of `CAPTIONS`, one below the other, unit vectors `[n, dim]`."""
    towers = material.towers
    assert towers is not None
    with torch.inference_mode():
        images = towers.encode_images(material.backbone([pixels])[0].class_token)
        texts = towers.encode_texts(tokenizer(towers.config.text)(CAPTIONS))
    return torch.cat([images, texts]).numpy()


def state_dict(backbone: VisionTransformer, towers: ImageText) -> dict[str, Tensor]:
    """Weights under open_clip's names.

    Its patch embedding has no bias, so the bias goes into the patches' positions.
    """
    ours = {name: value.detach().cpu() for name, value in backbone.state_dict().items()}
    table = ours["pos_embed"][0].clone()
    table[1:] += ours["patch_embed.proj.bias"]
    pre = {name: ours[f"norm_pre.{name}"] for name in ("weight", "bias") if f"norm_pre.{name}" in ours}
    out = {
        "visual.conv1.weight": ours["patch_embed.proj.weight"],
        "visual.class_embedding": ours["cls_token"][0, 0],
        "visual.positional_embedding": table,
        "visual.ln_post.weight": ours["norm.weight"],
        "visual.ln_post.bias": ours["norm.bias"],
        "visual.proj": towers.project.weight.detach().cpu().T,
        "logit_scale": towers.logit_scale.detach().cpu()[0],
    }
    out |= {f"visual.ln_pre.{name}": value for name, value in pre.items()}
    if isinstance(towers, Siglip):
        out["logit_bias"] = towers.logit_bias.detach().cpu()[0]
    for name, value in ours.items():
        if name.startswith("blocks."):
            out["visual.transformer.resblocks." + rename_keys(name.removeprefix("blocks."), IN_BLOCKS)] = value
    if not backbone.config.qkv_bias:
        for i in range(backbone.config.depth):
            out[f"visual.transformer.resblocks.{i}.attn.in_proj_bias"] = torch.zeros(3 * backbone.config.embed_dim)
    out |= {f"text.{name}": value.detach().cpu() for name, value in towers.text.state_dict().items()}
    return {name: value.contiguous().clone() for name, value in out.items()}


IN_BLOCKS = {
    "norm1.": "ln_1.",
    "norm2.": "ln_2.",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "ls1.": "ls_1.",
    "ls2.": "ls_2.",
}
"""Parts of a block as we name them, and as open_clip does."""


def _model(config: VisionTransformerConfig, towers: ImageText) -> dict[str, Any]:
    text = towers.config.text
    bias = {"init_logit_bias": float(towers.logit_bias)} if isinstance(towers, Siglip) else {}
    return {
        "embed_dim": towers.config.embed_dim,
        "custom_text": True,
        "quick_gelu": config.activation == "quick_gelu",
        **bias,
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.embed_dim,
            "layers": config.depth,
            "head_width": config.embed_dim // config.num_heads,
            "mlp_ratio": (config.hidden + 0.5) / config.embed_dim,  # it is rounded down
            "ls_init_value": config.layer_scale_init,
            "no_ln_pre": not config.pre_norm,
            "norm_kwargs": {"eps": config.norm_eps},
        },
        "text_cfg": {
            "context_length": text.context,
            "vocab_size": towers.text.vocab_size,
            "width": text.width,
            "heads": text.num_heads,
            "layers": text.layers,
        },
    }


def _preparation(material: PublishSource) -> dict[str, Any]:
    views, side = material.views, material.backbone.image_size
    return {
        "size": side,
        "mean": list(views.mean),
        "std": list(views.std),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
