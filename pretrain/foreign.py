"""Backbones of other libraries: timm, transformers, torch.hub, TorchScript."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.errors import UserError
from pretrain import weights
from pretrain.backbones import Backbone, center_crop, default_device
from pretrain.config import TimmBackbone, TorchHubBackbone, TorchScriptBackbone, TransformersBackbone

if TYPE_CHECKING:
    from torch import nn


def load(config: TimmBackbone | TransformersBackbone | TorchHubBackbone | TorchScriptBackbone) -> Backbone:
    """Load a backbone onto the GPU, if there is one.

    Raises:
        UserError: the weights are missing or do not fit, or the library is not installed.
    """
    if isinstance(config, TimmBackbone):
        return Timm(config)
    if isinstance(config, TorchHubBackbone):
        return Normalised(_of_hub(config), config)
    if isinstance(config, TransformersBackbone):
        return Transformers(config)
    return Normalised(_scripted(config), config)


class Timm:
    """The pooled features of a timm model."""

    def __init__(self, config: TimmBackbone) -> None:
        import timm

        try:
            model = timm.create_model(config.model, pretrained=False, num_classes=0)
        except RuntimeError as error:
            raise UserError(f"model: {config.model}: {error}; timm.list_models() has the names") from None
        _fill(model, config.checkpoint)
        self.model = model.requires_grad_(False).eval().to(default_device())
        self._preprocess: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))

    def preprocess(self, image: Image.Image) -> Tensor:
        return self._preprocess(image)

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        return self.model(batch.to(default_device())).float().cpu()


def _fill(model: nn.Module, path: str) -> None:
    """Load weights; a classifier among them is left out."""
    state = weights.read(path)
    if isinstance(state, dict):
        state = state.get("state_dict", state.get("model", state))
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path}: not weights of this model: {error}".splitlines()[0]) from None
    if missing:
        raise UserError(f"{path}: has no weights {', '.join(missing[:3])}; is it of another model?")


class Transformers:
    """The pooled output of a transformers vision model; of one that does not pool, its first token."""

    def __init__(self, config: TransformersBackbone) -> None:
        try:
            from transformers import AutoImageProcessor, AutoModel
        except ImportError:
            raise UserError("backbone: kind transformers needs its package; pip install transformers") from None
        if not Path(config.checkpoint).is_dir():
            raise UserError(f"{config.checkpoint}: no such folder; give what save_pretrained wrote")
        try:
            model = AutoModel.from_pretrained(config.checkpoint, local_files_only=True, use_safetensors=True)
            self._processor: Any = AutoImageProcessor.from_pretrained(config.checkpoint, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{config.checkpoint}: not a model of transformers: {error}".splitlines()[0]) from None
        self.model = getattr(model, "vision_model", model).requires_grad_(False).eval().to(default_device())

    def preprocess(self, image: Image.Image) -> Tensor:
        return self._processor(image, return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        found = self.model(pixel_values=batch.to(default_device()))
        pooled = getattr(found, "pooler_output", None)
        return (found.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1).float().cpu()


def _scripted(config: TorchScriptBackbone) -> Callable[[Tensor], Tensor]:
    try:
        return torch.jit.load(config.checkpoint, map_location=default_device()).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{config.checkpoint}: not a TorchScript module: {error}".splitlines()[0]) from None


def _of_hub(config: TorchHubBackbone) -> Callable[[Tensor], Tensor]:
    if not (Path(config.repository) / "hubconf.py").is_file():
        raise UserError(f"{config.repository}: no folder with hubconf.py; give a torch.hub repository")
    before = set(sys.modules)
    try:
        model = torch.hub.load(config.repository, config.model, source="local", pretrained=False)
    except Exception as error:  # the repository's own code may raise anything
        raise UserError(f"{config.repository}: {config.model}: {error}".splitlines()[0]) from None
    finally:
        _forget(set(sys.modules) - before, Path(config.repository).resolve())
    if not isinstance(model, torch.nn.Module):
        raise UserError(f"{config.repository}: {config.model}: gives no module; name another entry point")
    _fill(model, config.checkpoint)
    return model.requires_grad_(False).eval().to(default_device())


def _forget(modules: set[str], folder: Path) -> None:
    """Of what was imported, what lies in a folder: another repository may have modules of the same names."""
    for name in modules:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).resolve().is_relative_to(folder):
            del sys.modules[name]


class Normalised:
    """What a module makes of normalised images."""

    def __init__(self, module: Callable[[Tensor], Tensor], config: TorchScriptBackbone | TorchHubBackbone) -> None:
        self.module = module
        self.side = config.input_size
        self.mean, self.std = (torch.tensor(each).view(1, 3, 1, 1) for each in (config.mean, config.std))

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return center_crop(image, self.side)

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        pixels = (batch.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return self.module(pixels.to(default_device())).float().cpu()
