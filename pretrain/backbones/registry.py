"""Loads a backbone from its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pretrain.backbones.base import Backbone
from pretrain.backbones.checkpoint_backbone import VitCheckpointBackbone, load_checkpoint_backbone
from pretrain.backbones.config import BackboneConfig
from pretrain.backbones.open_clip_backbone import OpenClipBackbone
from pretrain.backbones.pixel_descriptor import PixelDescriptor
from pretrain.backbones.timm_backbone import TimmBackbone
from pretrain.backbones.torch_hub import load_torch_hub
from pretrain.backbones.torchscript import load_torchscript
from pretrain.backbones.transformers_backbone import TransformersBackbone

_LOADERS: dict[str, Callable[[Any], Backbone]] = {
    "pixels": PixelDescriptor,
    "checkpoint": load_checkpoint_backbone,
    "official": VitCheckpointBackbone.from_official,
    "open_clip": OpenClipBackbone,
    "timm": TimmBackbone,
    "transformers": TransformersBackbone,
    "torch_hub": load_torch_hub,
    "torchscript": load_torchscript,
}


def load_backbone(config: BackboneConfig) -> Backbone:
    """Load a backbone onto the GPU, if there is one.

    Raises:
        UserError: the weights are missing or do not fit, or the library is not installed.
    """
    return _LOADERS[config.kind](config)
