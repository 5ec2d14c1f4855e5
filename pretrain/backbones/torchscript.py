"""TorchScript modules as backbones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.errors import UserError
from pretrain.backbones.base import default_device
from pretrain.backbones.config import TorchHubBackboneConfig, TorchScriptBackboneConfig
from pretrain.backbones.preprocessing import Normalizer, center_crop


def load_torchscript(config: TorchScriptBackboneConfig) -> ModuleBackbone:
    """Load a TorchScript module.

    Raises:
        UserError: the file holds none.
    """
    try:
        return ModuleBackbone(torch.jit.load(config.checkpoint, map_location=default_device()).eval(), config)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{config.checkpoint}: not a TorchScript module: {error}".splitlines()[0]) from None


class ModuleBackbone:
    """What a module makes of normalized images."""

    def __init__(
        self, module: Callable[[Tensor], Tensor], config: TorchScriptBackboneConfig | TorchHubBackboneConfig
    ) -> None:
        self.module = module
        self.side = config.input_size
        self._normalize = Normalizer(config.mean, config.std)

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return center_crop(image, self.side)

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        return self.module(self._normalize(batch).to(default_device())).float().cpu()
