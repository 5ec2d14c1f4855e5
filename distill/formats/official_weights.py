"""Weights under the key names of the official DINOv2 or DINOv3 code."""

from __future__ import annotations

from pathlib import Path

import torch

from infra.errors import UserError
from pretrain.data.config import Views
from pretrain.models.official import to_official
from pretrain.models.timm_network import Network, TimmNetwork

FILE = "official.pth"


def write(backbone: Network, views: Views, directory: Path) -> None:
    """Write `official.pth`, a plain state dict.

    Raises:
        UserError: the backbone is a network of timm.
    """
    if isinstance(backbone, TimmNetwork):
        raise UserError(f"formats: official has no model like {backbone.config.name}; leave it out")
    if backbone.config.pre_norm or backbone.config.activation != "gelu":
        raise UserError("model.pre_norm: the official code has no model like this one; leave the format out")
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    torch.save(to_official(state, backbone.config), directory / FILE)
