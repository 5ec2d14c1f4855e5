"""What formats are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.backbones.image_text import towers_of
from pretrain.checkpoint.artifact import Checkpoint
from pretrain.data.config import Views
from pretrain.models.timm_network import Network, TimmNetwork
from pretrain.objectives.image_text import ImageText


@dataclass(frozen=True)
class PublishSource:
    """A released backbone, how its images are normalized, and the towers that bring it and texts together."""

    backbone: Network
    views: Views
    towers: ImageText | None
    """None where it was trained without captions"""

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> PublishSource:
        backbone = checkpoint.backbone()
        return cls(backbone, checkpoint.views, towers_of(checkpoint, backbone))

    @torch.inference_mode()
    def tokens(self, pixels: Tensor) -> np.ndarray:
        """Class and patch tokens, `[n, 1 + patches, dim]`; of a network of timm that is no Vision Transformer class
        tokens alone."""
        (said,) = self.backbone([pixels])
        if isinstance(self.backbone, TimmNetwork) and not getattr(self.backbone.network, "num_prefix_tokens", 0):
            return said.class_token.numpy()
        return torch.cat([said.class_token[:, None], said.patch_tokens], dim=1).numpy()

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> np.ndarray:
        """Class tokens of normalized images `[n, 3, side, side]`, float32 `[n, dim]`."""
        return self.backbone([pixels])[0].class_token.numpy()
