"""Whether a tool has a model like a backbone."""

from __future__ import annotations

from collections.abc import Mapping

from infra.errors import UserError
from pretrain.models.timm_network import Network, TimmNetwork
from pretrain.models.vit import VisionTransformer


def only_vit(backbone: Network, tool: str) -> VisionTransformer:
    """The backbone, for a format that knows our Vision Transformer alone.

    Raises:
        UserError: it is a network of timm.
    """
    if isinstance(backbone, TimmNetwork):
        raise UserError(f"formats: {tool} has no model like {backbone.config.name}; leave it out")
    return backbone


def require_none(departures: Mapping[str, bool], tool: str) -> None:
    """Refuse a model that a tool cannot hold.

    Args:
        departures: by key of the model's settings, whether it departs from all that the tool has.

    Raises:
        UserError: it does.
    """
    for key, departs in departures.items():
        if departs:
            raise UserError(f"model.{key}: {tool} has no model like this one; leave the format out")
