"""The image tower of an open_clip model."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from infra.errors import UserError
from pretrain.backbones import weight_files
from pretrain.backbones.base import Tokens, default_device, split_tokens
from pretrain.backbones.config import OpenClipBackboneConfig
from pretrain.backbones.preprocessing import Normalizer, trim_aspect
from pretrain.data.config import IMAGENET_MEAN, IMAGENET_STD


class OpenClipBackbone:
    """The image tower of an open_clip model."""

    def __init__(self, config: OpenClipBackboneConfig) -> None:
        import open_clip

        try:
            how = weight_files.read_preprocessing(config)
            model, _, preprocess = open_clip.create_model_and_transforms(
                config.model,
                pretrained=config.checkpoint,
                image_mean=how["mean"],
                image_std=how["std"],
                image_interpolation=how["interpolation"],
                image_resize_mode=how["resize_mode"],
            )
        except Exception as error:  # a damaged file can raise anything in the readers; none runs code of it
            raise UserError(
                f"{config.checkpoint}: not a checkpoint of {config.model}: {error}".splitlines()[0]
            ) from None
        self._preprocess: Any = preprocess
        self.model = model.requires_grad_(False).eval().to(default_device())
        visual: Any = self.model.visual
        self.depth = len(visual.trunk.feature_info) if hasattr(visual, "trunk") else _depth(visual)
        self.side = max(as_pair(visual.image_size))
        self.patch = max(as_pair(getattr(visual, "patch_size", 32)))  # ResNets shrink by 32
        self.any_size = False
        self._normalize = Normalizer(visual.image_mean or IMAGENET_MEAN, visual.image_std or IMAGENET_STD)

    def preprocess(self, image: Image.Image) -> Tensor:
        return self._preprocess(trim_aspect(image))

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        return self.model.encode_image(batch.to(default_device())).float().cpu()

    def get_normalized_layers(self, images: Tensor) -> Tensor:
        return self._normalize(images)

    @torch.inference_mode()
    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        options = {"normalize_intermediates": norm, "output_extra_tokens": True}
        last = min(blocks, self.depth)
        found = self.model.visual.forward_intermediates(batch.to(default_device()), last, **options)
        maps, prefixes = found["image_intermediates"], found.get("image_intermediates_prefix")
        tokens = [split_tokens(each, prefixes[i] if prefixes else None) for i, each in enumerate(maps)]
        return found["image_features"].float().cpu(), tokens


def _depth(visual: Any) -> int:
    """Blocks of a Vision Transformer, or stages of a ResNet."""
    return len(visual.transformer.resblocks) if hasattr(visual, "transformer") else 4


def as_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
