"""Weights under the key names of the official DINOv2 or DINOv3 code."""

from __future__ import annotations

from pathlib import Path

import torch

from pretrain.data.config import Views
from pretrain.models.official import to_official
from pretrain.models.timm_network import Network
from pretrain.models.vit import VisionTransformer

FILE = "official.pth"


def write(backbone: Network, views: Views, directory: Path) -> None:
    """Write `official.pth`, a plain state dict, of a backbone that `require_compatible` accepts."""
    assert isinstance(backbone, VisionTransformer)
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    torch.save(to_official(state, backbone.config), directory / FILE)
