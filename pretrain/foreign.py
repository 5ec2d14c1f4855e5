"""Backbones of other libraries: timm, transformers, torch.hub, TorchScript."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.errors import UserError
from pretrain import published, weights
from pretrain.backbones import Backbone, Normaliser, Tokens, center_crop, default_device, tokens_of, without_ends
from pretrain.config import (
    TimmBackbone,
    TorchHubBackbone,
    TorchScriptBackbone,
    TransformersBackbone,
)
from pretrain.data.config import IMAGENET_MEAN, IMAGENET_STD
from pretrain.models import timm_network

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
        module = _of_hub(config)
        layered = hasattr(module, "get_intermediate_layers") and isinstance(getattr(module, "patch_size", None), int)
        return Hub(module, config) if layered else Normalised(module, config)
    if isinstance(config, TransformersBackbone):
        return Transformers(config)
    return Normalised(_scripted(config), config)


class Timm:
    """The pooled features of a timm model."""

    def __init__(self, config: TimmBackbone) -> None:
        import timm

        weights = published.path(config)
        model: Any = _of_timm(config)
        _fill(model, str(weights / "model.safetensors" if weights.is_dir() else weights))
        data = timm.data.resolve_model_data_config(model)
        self.model = model.requires_grad_(False).eval().to(default_device())
        self._preprocess: Any = timm.data.create_transform(**data)
        self._normalise = Normaliser(data["mean"], data["std"])
        self.side = max(data["input_size"][1:])
        self.patch = int(getattr(model, "feature_info", [{"reduction": 32}])[-1]["reduction"])
        self.any_size = bool(getattr(model, "dynamic_img_size", not hasattr(model, "patch_embed")))

    def preprocess(self, image: Image.Image) -> Tensor:
        return self._preprocess(without_ends(image))

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        return self.model(batch.to(default_device())).float().cpu()

    def normalised(self, images: Tensor) -> Tensor:
        return self._normalise(images)

    @torch.inference_mode()
    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        vectors, found = timm_network.layers(self.model, batch.to(default_device()), blocks, norm)
        return vectors.float().cpu(), [tokens_of(grid, prefix) for grid, prefix in found]


def _of_timm(config: TimmBackbone) -> nn.Module:
    """A model without classifier; a Vision Transformer takes images of any size."""
    name = f"local-dir:{config.checkpoint}" if Path(config.checkpoint).is_dir() else config.model
    model: nn.Module = timm_network.created(name, f"model: {config.model}", {"dynamic_img_size": True}, {})[0]
    return model


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
        self.folder = folder = published.path(config)
        if not folder.is_dir():
            raise UserError(f"{config.checkpoint}: no such folder; give what save_pretrained wrote")
        try:
            model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{config.checkpoint}: not a model of transformers: {error}".splitlines()[0]) from None
        self.whole = model.requires_grad_(False).eval().to(default_device())
        self.model = getattr(model, "vision_model", model)
        settings: Any = self.model.config
        self._sized = (
            {}
            if "interpolate_pos_encoding" not in inspect.signature(self.model.forward).parameters
            else {"interpolate_pos_encoding": True}
        )
        self.side = int(self.preprocess(Image.new("RGB", (256, 256))).shape[-1])
        self.patch = int(getattr(settings, "patch_size", 32))
        self.any_size = bool(self._sized) or settings.model_type.startswith(("dinov2", "dinov3", "convnext", "resnet"))
        self._normalise = Normaliser(
            getattr(self._processor, "image_mean", None) or IMAGENET_MEAN,
            getattr(self._processor, "image_std", None) or IMAGENET_STD,
        )

    def preprocess(self, image: Image.Image) -> Tensor:
        return self._processor(without_ends(image), return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        return self._vectors(self.model(pixel_values=batch.to(default_device()), **self._sized))

    def _vectors(self, found: Any) -> Tensor:
        pooled = getattr(found, "pooler_output", None)
        return (found.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1).float().cpu()

    def normalised(self, images: Tensor) -> Tensor:
        return self._normalise(images)

    @torch.inference_mode()
    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        found = self.model(pixel_values=batch.to(default_device()), output_hidden_states=True, **self._sized)
        grid = tuple(side // self.patch for side in batch.shape[-2:])
        return self._vectors(found), [self._tokens(each, grid, norm) for each in found.hidden_states[1:][-blocks:]]

    def _tokens(self, hidden: Tensor, grid: tuple[int, ...], norm: bool) -> Tokens:
        if hidden.ndim == 4:  # a convolutional network's map
            return tokens_of(hidden, None)
        for name in ("layernorm", "post_layernorm", "norm") if norm else ():
            module = getattr(self.model, name, None)
            if module is not None and tuple(module.normalized_shape) == hidden.shape[-1:]:
                hidden = module(hidden)
        prefix = hidden.shape[1] - grid[0] * grid[1]
        if prefix < 0:  # a network that merges patches, Swin say
            side = math.isqrt(hidden.shape[1])
            grid, prefix = (side, hidden.shape[1] // side), 0
        patches = hidden[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
        return tokens_of(patches, hidden[:, :prefix] if prefix else None)


def _scripted(config: TorchScriptBackbone) -> Callable[[Tensor], Tensor]:
    try:
        return torch.jit.load(config.checkpoint, map_location=default_device()).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{config.checkpoint}: not a TorchScript module: {error}".splitlines()[0]) from None


def _of_hub(config: TorchHubBackbone) -> nn.Module:
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
        self._normalise = Normaliser(config.mean, config.std)

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return center_crop(image, self.side)

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        return self.module(self._normalise(batch).to(default_device())).float().cpu()


class Hub(Normalised):
    """A module with DINOv2's `get_intermediate_layers`."""

    any_size = True

    def __init__(self, module: Any, config: TorchHubBackbone) -> None:
        super().__init__(module, config)
        self.layered = module
        self.patch: int = module.patch_size

    def normalised(self, images: Tensor) -> Tensor:
        return images

    @torch.inference_mode()
    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        options = {"reshape": True, "return_class_token": True, "norm": norm}
        found = self.layered.get_intermediate_layers(self._normalise(batch).to(default_device()), blocks, **options)
        return self.features(batch), [tokens_of(grid, token[:, None]) for grid, token in found]
