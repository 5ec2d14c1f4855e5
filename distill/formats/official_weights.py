"""Weights under the key names of the official DINOv2 or DINOv3 code."""

from __future__ import annotations

from pathlib import Path

import torch

from distill.formats.fitting import only_vit, require_none
from pretrain.data.config import Views
from pretrain.models.official import to_official
from pretrain.models.timm_network import Network

FILE = "official.pth"


def write(backbone: Network, views: Views, directory: Path) -> None:
    """Write `official.pth`, a plain state dict.

    Raises:
        UserError: the official code has no model like this one.
    """
    vit = only_vit(backbone, "official")
    departures = {"pre_norm": vit.config.pre_norm, "activation": vit.config.activation != "gelu"}
    require_none(departures, "the official code")
    state = {name: value.detach().cpu().contiguous() for name, value in vit.state_dict().items()}
    torch.save(to_official(state, vit.config), directory / FILE)
