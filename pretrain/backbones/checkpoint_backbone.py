"""Backbones of Fovea's own checkpoints and of official DINOv2 and DINOv3 weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.errors import UserError
from pretrain.backbones import weights
from pretrain.backbones.base import Backbone, Tokens, default_device, split_tokens
from pretrain.backbones.config import CheckpointBackboneConfig, OfficialBackboneConfig
from pretrain.backbones.preprocessing import center_crop
from pretrain.checkpoint.artifact import Checkpoint
from pretrain.data.config import Views
from pretrain.models import timm_network
from pretrain.models.official import from_official
from pretrain.models.timm_network import Network, TimmNetwork
from pretrain.models.vit import VisionTransformer


def load_checkpoint_backbone(config: CheckpointBackboneConfig) -> Backbone:
    checkpoint = Checkpoint.open(config.url)
    model = checkpoint.untrained_backbone() if config.untrained else checkpoint.backbone()
    return wrap_checkpoint(model, checkpoint.views)


def wrap_checkpoint(model: Network, views: Views) -> VitCheckpointBackbone | TimmCheckpointBackbone:
    """The backbone of a checkpoint behind the call of all backbones, on the GPU, if there is one."""
    if isinstance(model, TimmNetwork):
        return TimmCheckpointBackbone.from_views(model, model.image_size, views.mean, views.std)
    return VitCheckpointBackbone.from_views(model, model.image_size, views.mean, views.std)


Model = TypeVar("Model", VisionTransformer, TimmNetwork)


@dataclass
class CheckpointBackbone(Generic[Model]):
    """A network of a checkpoint; its vector is the class token."""

    model: Model
    side: int
    """Side in pixels that images are brought to."""
    mean: Tensor
    std: Tensor

    @classmethod
    def from_views(cls, model: Model, side: int, mean: Sequence[float], std: Sequence[float]) -> Self:
        device = default_device()
        return cls(
            model.to(device), side, *(torch.tensor(each, device=device).view(1, 3, 1, 1) for each in (mean, std))
        )

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return center_crop(image, self.side)

    @property
    def patch(self) -> int:
        return self.model.patch_size

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        return self.model([self.pixels(batch)])[0].class_token.float().cpu()

    def get_normalized_layers(self, images: Tensor) -> Tensor:
        return images

    def pixels(self, images: Tensor) -> Tensor:
        """What the network takes of images, uint8 `[n, H, W, 3]`."""
        return (images.to(self.mean.device).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


class TimmCheckpointBackbone(CheckpointBackbone[TimmNetwork]):
    """A network of timm that was distilled."""

    @property
    def any_size(self) -> bool:
        return self.model.any_size

    @torch.inference_mode()
    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        images = self.model.pad_to_patches(self.pixels(batch))
        vectors, found = timm_network.layers(self.model.network, images, blocks, norm)
        return vectors.float().cpu(), [split_tokens(grid, prefix) for grid, prefix in found]


class VitCheckpointBackbone(CheckpointBackbone[VisionTransformer]):
    """A Vision Transformer of a checkpoint, ours or an official one."""

    @classmethod
    def from_official(cls, config: OfficialBackboneConfig) -> VitCheckpointBackbone:
        state = weights.read_weights(config.checkpoint)
        model = VisionTransformer(config.architecture).requires_grad_(False).eval()
        try:
            state = state.get("teacher", state) if isinstance(state, dict) else {}
            model.load_state_dict(from_official(state, config.architecture))
        except UserError as error:
            raise UserError(f"{config.checkpoint}: {error}") from None
        return cls.from_views(model, config.input_size, config.mean, config.std)

    @property
    def any_size(self) -> bool:
        return True

    @torch.inference_mode()
    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        pixels = self.pixels(batch)
        found = self.model.get_intermediate_layers(pixels, blocks, norm)
        grid = tuple(side // self.patch for side in pixels.shape[-2:])
        tokens = [Tokens(each.class_token.float(), each.patch_tokens.float().unflatten(1, grid)) for each in found]
        vectors = tokens[-1].class_token if norm else self.model([pixels])[0].class_token.float()
        return vectors.cpu(), tokens
