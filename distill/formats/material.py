"""What formats are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.checkpoints import Checkpoint
from pretrain.data.config import Views
from pretrain.image_text import towers_of
from pretrain.models.timm_network import Network
from pretrain.objectives.image_text import ImageText


@dataclass(frozen=True)
class Material:
    """A released backbone, how its images are normalised, and the towers that bring it and texts together."""

    backbone: Network
    views: Views
    towers: ImageText | None
    """None where it was trained without captions"""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Material:
        return cls(checkpoint.backbone(), checkpoint.views, towers_of(checkpoint))

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> np.ndarray:
        """Class tokens of normalised images `[n, 3, side, side]`, float32 `[n, dim]`."""
        return self.backbone([pixels])[0].class_token.numpy()
