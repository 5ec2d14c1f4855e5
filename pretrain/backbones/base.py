"""Frozen backbones of any origin behind one call: images in, vectors out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.errors import UserError
from pretrain.distributed import device_of_rank


class Backbone(Protocol):
    """A frozen map from images to vectors."""

    def preprocess(self, image: Image.Image) -> np.ndarray | Tensor:
        """One RGB image to the array that `features` takes a stack of."""

    def features(self, batch: Tensor) -> Tensor:
        """A stack of preprocessed images to float32 `[n, dim]`."""


@dataclass
class Tokens:
    """What a block says of n images; float32, on the CPU or the GPU."""

    class_token: Tensor
    """`[n, dim]`; of a network without one the mean of its patches"""
    patch_tokens: Tensor
    """`[n, h, w, dim]`"""


@runtime_checkable
class TokenBackbone(Backbone, Protocol):
    """A backbone that tells of every patch, too."""

    @property
    def side(self) -> int:
        """Side in pixels that images are brought to."""

    @property
    def patch(self) -> int:
        """Side in pixels of what a patch token stands for; sides of images are multiples of it."""

    @property
    def any_size(self) -> bool:
        """Whether images may have other sides than `side`."""

    def get_normalized_layers(self, images: Tensor) -> Tensor:
        """Images that are not preprocessed, uint8 `[n, H, W, 3]`, to what `layers` takes."""

    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        """What `features` gives, and the tokens after each of the last blocks, in order; of fewer blocks, all.

        Args:
            norm: give them through the final norm, where the network has one.
        """


def require_tokens(backbone: Backbone, who: str) -> TokenBackbone:
    """The same backbone, known to have patch tokens.

    Raises:
        UserError: it has none.
    """
    if not isinstance(backbone, TokenBackbone):
        raise UserError(f"{who}: this backbone gives one vector an image and no patch tokens; leave the task out")
    return backbone


def default_device() -> torch.device:
    """This process's GPU, if there is one."""
    return device_of_rank()


def split_tokens(grid: Tensor, prefix: Tensor | None) -> Tokens:
    """Tokens of a map `[n, dim, h, w]` and of what stands before it, `[n, tokens, dim]`, the class token first."""
    patches = grid.float().permute(0, 2, 3, 1)
    return Tokens(patches.mean((1, 2)) if prefix is None else prefix[:, 0].float(), patches)
