"""A network of timm as a student: crops in, a class token and patch tokens out, whatever it is made of."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from infra.errors import UserError
from pretrain.models.config import TimmNetworkConfig
from pretrain.models.execution import Execution
from pretrain.models.vit import Features, VisionTransformer

_SIDE = 224
_OTHER = 64  # pixels that the other sides of which a network is asked differ from its own


class TimmNetwork(nn.Module):
    """A network of timm without its classifier.

    Its class token is what timm pools, its patch tokens the places of its last map.

    Attributes:
        dim: width of the class token.
        patch_dim: width of the patch tokens.
        patch_size: side in pixels of what a patch token stands for.
        options: what timm was told beside the name.
        image_size: side in pixels at which it is evaluated and published.
        any_size: whether it takes crops of any side; others are resized to its own.
        whole: sides of crops are multiples of this; others are resized to the next smaller one.
    """

    def __init__(self, config: TimmNetworkConfig) -> None:
        super().__init__()
        self.config, self.image_size = config, config.image_size or _SIDE
        self._execution = Execution()
        self.network, self.options = build_timm(config)
        with torch.device("meta"):
            shapes = build_timm(config)[0].eval()
            self.any_size = _takes(shapes, self.image_size + _OTHER)
            side = _SIDE if self.any_size else self.image_size  # small maps are rounded up: they tell no patch size
            vector, ((grid, _),) = layers(shapes, torch.empty(1, 3, side, side), 1)
        self.embed_dim, self.patch_dim = vector.shape[1], grid.shape[1]
        self.patch_size = side // grid.shape[-1]
        self.whole = _patch(shapes)

    @property
    def execution(self) -> Execution:
        """What training spares in memory: nothing, or as timm's own checkpointing does."""
        return self._execution

    @execution.setter
    def execution(self, value: Execution) -> None:
        self._execution = value
        # Computed again, batch normalization would count a batch twice.
        counting = any(isinstance(each, _BatchNorm) for each in self.network.modules())
        if value.checkpointing != "none" and not counting:
            self.network.set_grad_checkpointing(True)

    def __call__(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> list[Features]:
        """Features of each group of crops `[B, 3, H, W]`, squares; there are no masks.

        A map's tokens come row by row, `[B, h * w, patch_dim]`.
        """
        if masks is not None and any(each is not None for each in masks):
            raise ValueError(f"{self.config.name}: has no mask token")
        return [Features(*tokens) for tokens in super().__call__(crops)]

    def forward(self, crops: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Class and patch tokens of each group; see `__call__`."""
        return [self._tokens(images) for images in crops]

    def _tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        vector, ((grid, _),) = layers(self.network, self.pad_to_patches(images), 1)
        return vector, grid.flatten(2).transpose(1, 2)

    def pad_to_patches(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` at sides that the network takes."""
        side = self.image_size
        if self.any_size:
            side = max(images.shape[-1] // self.whole, 1) * self.whole
        if images.shape[-2:] == (side, side):
            return images
        return F.interpolate(images, (side, side), mode="bilinear", antialias=True)


Network = VisionTransformer | TimmNetwork
"""A backbone that can be trained."""


def with_image_size(config: TimmNetworkConfig, side: int) -> TimmNetworkConfig:
    """The same network with a side of its own: where none is given, that of crops if it takes any, else its usual one.

    Args:
        side: of the crops that it is trained on, in pixels.
    """
    if config.image_size is not None:
        return config
    with torch.device("meta"):
        network = TimmNetwork(config)
    own = max(side // network.whole, 1) * network.whole if network.any_size else _SIDE
    return config.model_copy(update={"image_size": own})


def build_timm(config: TimmNetworkConfig) -> tuple[Any, dict[str, Any]]:
    """The bare network, and what timm was told beside its name; a Vision Transformer takes images of any size.

    Raises:
        UserError: timm has none of that name, or it cannot tell what its blocks say.
    """
    from timm.layers import DropPath

    sized: dict[str, Any] = {"img_size": config.image_size or _SIDE}
    network, options = create_model(config.name, config.name, sized | {"dynamic_img_size": True}, sized, {})
    for module in network.modules():  # some have stochastic depth or dropout without being asked
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
    if not hasattr(network, "forward_intermediates"):
        raise UserError(f"{config.name}: gives no features of its blocks; choose another network of timm")
    return network, options


def create_model(name: str, who: str, *attempts: dict[str, Any], classes: int = 0) -> tuple[Any, dict[str, Any]]:
    """A network of timm with initial weights, and the first of some options that it takes.

    Args:
        who: whose name it is, for the message.
        classes: of its classifier; 0: it has none.

    Raises:
        UserError: timm has none of that name.
    """
    import timm  # here: a rank that trains another backbone need not have it

    for options in attempts:
        try:
            return timm.create_model(name, pretrained=False, num_classes=classes, **options), options
        except TypeError:  # it takes fewer options
            if options is attempts[-1]:
                raise
        except RuntimeError as error:
            raise UserError(f"{who}: {error}; timm.list_models() has the names") from None
    raise AssertionError("no attempt")


def layers(
    network: Any, images: Tensor, blocks: int, norm: bool = True
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """What a network of timm pools, `[B, dim]`, and what its last blocks (or stages) say, in order; of fewer, all.

    Returns:
        Maps `[B, dim, h, w]` each with the tokens that stand before them, `[B, tokens, dim]`, where there are any.
    """
    takes = inspect.signature(network.forward_intermediates).parameters
    options = {name: value for name, value in (("norm", norm), ("return_prefix_tokens", True)) if name in takes}
    final, found = network.forward_intermediates(images, min(blocks, len(network.feature_info)), **options)
    pairs = [each if isinstance(each, tuple) else (each, None) for each in found]
    return network.forward_head(final, pre_logits=True), pairs


def _patch(network: Any) -> int:
    """Side of what a network cuts images into before all else; of a convolutional one 1."""
    size = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    return int(size if isinstance(size, int) else size[0])


def _takes(shapes: Any, side: int) -> bool:
    """Whether a network without values takes images of a side."""
    try:
        shapes(torch.empty(1, 3, side, side, device="meta"))
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True
