"""Models of timm as backbones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from pretrain.backbones import weight_files
from pretrain.backbones.base import Tokens, default_device, split_tokens
from pretrain.backbones.config import TimmBackboneConfig
from pretrain.backbones.preprocessing import Normalizer, trim_aspect
from pretrain.backbones.weights import load_weights
from pretrain.models import timm_network

if TYPE_CHECKING:
    from torch import nn


class TimmBackbone:
    """The pooled features of a timm model."""

    def __init__(self, config: TimmBackboneConfig) -> None:
        import timm

        weights = weight_files.resolve_weights(config)
        model: Any = _load_timm(config)
        load_weights(model, str(weights / "model.safetensors" if weights.is_dir() else weights))
        data = timm.data.resolve_model_data_config(model)
        self.model = model.requires_grad_(False).eval().to(default_device())
        self._preprocess: Any = timm.data.create_transform(**data)
        self._normalize = Normalizer(data["mean"], data["std"])
        self.side = max(data["input_size"][1:])
        self.patch = int(getattr(model, "feature_info", [{"reduction": 32}])[-1]["reduction"])
        self.any_size = bool(getattr(model, "dynamic_img_size", not hasattr(model, "patch_embed")))

    def preprocess(self, image: Image.Image) -> Tensor:
        return self._preprocess(trim_aspect(image))

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        return self.model(batch.to(default_device())).float().cpu()

    def get_normalized_layers(self, images: Tensor) -> Tensor:
        return self._normalize(images)

    @torch.inference_mode()
    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        vectors, found = timm_network.layers(self.model, batch.to(default_device()), blocks, norm)
        return vectors.float().cpu(), [split_tokens(grid, prefix) for grid, prefix in found]


def _load_timm(config: TimmBackboneConfig) -> nn.Module:
    """A model without classifier; a Vision Transformer takes images of any size."""
    name = f"local-dir:{config.checkpoint}" if Path(config.checkpoint).is_dir() else config.model
    model: nn.Module = timm_network.create_model(name, f"model: {config.model}", {"dynamic_img_size": True}, {})[0]
    return model
