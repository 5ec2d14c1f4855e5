"""Vision models of transformers as backbones."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from infra.errors import UserError
from pretrain.backbones import weight_files
from pretrain.backbones.base import Tokens, default_device, split_tokens
from pretrain.backbones.config import TransformersBackboneConfig
from pretrain.backbones.preprocessing import Normalizer, trim_aspect
from pretrain.data.config import IMAGENET_MEAN, IMAGENET_STD


class TransformersBackbone:
    """The pooled output of a transformers vision model; of one that does not pool, its first token."""

    def __init__(self, config: TransformersBackboneConfig) -> None:
        try:
            from transformers import AutoImageProcessor, AutoModel
        except ImportError:
            raise UserError("backbone: kind transformers needs its package; pip install transformers") from None
        self.folder = folder = weight_files.resolve_weights(config)
        if not folder.is_dir():
            raise UserError(f"{config.checkpoint}: no such folder; give what save_pretrained wrote")
        try:
            model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{config.checkpoint}: not a model of transformers: {error}".splitlines()[0]) from None
        self.whole = model.requires_grad_(False).eval().to(default_device())
        self.model = getattr(model, "vision_model", model)
        settings: Any = self.model.config
        self._sized = (
            {}
            if "interpolate_pos_encoding" not in inspect.signature(self.model.forward).parameters
            else {"interpolate_pos_encoding": True}
        )
        self.side = int(self.preprocess(Image.new("RGB", (256, 256))).shape[-1])
        self.patch = int(getattr(settings, "patch_size", 32))
        self.any_size = bool(self._sized) or settings.model_type.startswith(("dinov2", "dinov3", "convnext", "resnet"))
        self._normalize = Normalizer(
            getattr(self._processor, "image_mean", None) or IMAGENET_MEAN,
            getattr(self._processor, "image_std", None) or IMAGENET_STD,
        )

    def preprocess(self, image: Image.Image) -> Tensor:
        return self._processor(trim_aspect(image), return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        return self._vectors(self.model(pixel_values=batch.to(default_device()), **self._sized))

    def _vectors(self, found: Any) -> Tensor:
        pooled = getattr(found, "pooler_output", None)
        return (found.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1).float().cpu()

    def get_normalized_layers(self, images: Tensor) -> Tensor:
        return self._normalize(images)

    @torch.inference_mode()
    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        found = self.model(pixel_values=batch.to(default_device()), output_hidden_states=True, **self._sized)
        grid = tuple(side // self.patch for side in batch.shape[-2:])
        return self._vectors(found), [self._tokens(each, grid, norm) for each in found.hidden_states[1:][-blocks:]]

    def _tokens(self, hidden: Tensor, grid: tuple[int, ...], norm: bool) -> Tokens:
        if hidden.ndim == 4:  # a convolutional network's map
            return split_tokens(hidden, None)
        for name in ("layernorm", "post_layernorm", "norm") if norm else ():
            module = getattr(self.model, name, None)
            if module is not None and tuple(module.normalized_shape) == hidden.shape[-1:]:
                hidden = module(hidden)
        prefix = hidden.shape[1] - grid[0] * grid[1]
        if prefix < 0:  # a network that merges patches, Swin say
            side = math.isqrt(hidden.shape[1])
            grid, prefix = (side, hidden.shape[1] // side), 0
        patches = hidden[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
        return split_tokens(patches, hidden[:, :prefix] if prefix else None)
