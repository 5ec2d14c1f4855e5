"""Models of torch.hub repositories as backbones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infra.errors import UserError
from pretrain.backbones.base import Tokens, default_device, split_tokens
from pretrain.backbones.config import TorchHubBackboneConfig
from pretrain.backbones.torchscript import ModuleBackbone
from pretrain.backbones.weights import load_weights

if TYPE_CHECKING:
    from torch import nn


def load_torch_hub(config: TorchHubBackboneConfig) -> ModuleBackbone:
    """Load a model of a repository; with DINOv2's `get_intermediate_layers` it has patch tokens.

    Raises:
        UserError: the repository, its entry point or the weights do not fit.
    """
    module: Any = _load_module(config)
    layered = hasattr(module, "get_intermediate_layers") and isinstance(getattr(module, "patch_size", None), int)
    return TorchHubBackbone(module, config) if layered else ModuleBackbone(module, config)


def _load_module(config: TorchHubBackboneConfig) -> nn.Module:
    if not (Path(config.repository) / "hubconf.py").is_file():
        raise UserError(f"{config.repository}: no folder with hubconf.py; give a torch.hub repository")
    before = set(sys.modules)
    try:
        model = torch.hub.load(config.repository, config.model, source="local", pretrained=False)
    except Exception as error:  # the repository's own code may raise anything
        raise UserError(f"{config.repository}: {config.model}: {error}".splitlines()[0]) from None
    finally:
        _remove_modules(set(sys.modules) - before, Path(config.repository).resolve())
    if not isinstance(model, torch.nn.Module):
        raise UserError(f"{config.repository}: {config.model}: gives no module; name another entry point")
    load_weights(model, config.checkpoint)
    return model.requires_grad_(False).eval().to(default_device())


def _remove_modules(modules: set[str], folder: Path) -> None:
    """Of what was imported, what lies in a folder: another repository may have modules of the same names."""
    for name in modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).resolve().is_relative_to(folder):
            del sys.modules[name]


class TorchHubBackbone(ModuleBackbone):
    """A module with DINOv2's `get_intermediate_layers`."""

    any_size = True

    def __init__(self, module: Any, config: TorchHubBackboneConfig) -> None:
        super().__init__(module, config)
        self.layered = module
        self.patch: int = module.patch_size

    def get_normalized_layers(self, images: Tensor) -> Tensor:
        return images

    @torch.inference_mode()
    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        options = {"reshape": True, "return_class_token": True, "norm": norm}
        found = self.layered.get_intermediate_layers(self._normalize(batch).to(default_device()), blocks, **options)
        return self.features(batch), [split_tokens(grid, token[:, None]) for grid, token in found]
