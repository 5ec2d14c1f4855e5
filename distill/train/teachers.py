"""Frozen networks of any origin as teachers: global crops in, features (or classes, or captions' vectors) out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives.config import DeitConfig
from infra.errors import UserError
from pretrain.backbones import registry, weights
from pretrain.backbones.base import default_device, require_tokens
from pretrain.backbones.config import BackboneConfig, OpenClipBackboneConfig
from pretrain.models import timm_network
from pretrain.models.vit import Features


class BackboneTeacher:
    """What `eval` would read of a backbone, of crops.

    Crops are resized to the side that the backbone is made for, unless it takes any.

    Attributes:
        dim: width of its vector.
        patch_dim: width of its patch tokens.
    """

    def __init__(self, name: str, config: BackboneConfig) -> None:
        self._backbone = require_tokens(registry.load_backbone(config), f"teachers.{name}")
        side = self._backbone.side
        tried = self(torch.full((1, 3, side, side), 0.5))
        self.embed_dim, self.patch_dim = tried.class_token.shape[1], tried.patch_tokens.shape[2]

    def __call__(self, crops: Tensor) -> Features:
        """Crops `[n, 3, S, S]`, values 0 to 1, to features of them on the same device, float32."""
        images = _resize(crops, self._side(crops.shape[-1])).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
        backbone = self._backbone
        vectors, (tokens,) = backbone.layers(backbone.get_normalized_layers(images), 1)
        # Copies: what comes out of inference mode may not be part of a loss.
        return Features(vectors.to(crops.device, copy=True), tokens.patch_tokens.flatten(1, 2).to(crops.device).clone())

    def _side(self, side: int) -> int:
        patch = self._backbone.patch
        return max(side // patch, 1) * patch if self._backbone.any_size else self._backbone.side


def _resize(crops: Tensor, side: int) -> Tensor:
    if crops.shape[-1] == side:
        return crops
    return F.interpolate(crops, (side, side), mode="bilinear", antialias=True).clamp(0, 1)


class ClipTeacher(BackboneTeacher):
    """An open_clip model, which knows captions too.

    Raises:
        UserError: it reads captions otherwise than the student will.
    """

    def __init__(self, name: str, config: OpenClipBackboneConfig, context: int) -> None:
        import open_clip

        super().__init__(name, config)
        self._model: Any = self._backbone.model  # type: ignore[attr-defined]
        tokenizer = open_clip.get_tokenizer(config.model)
        if not isinstance(tokenizer, open_clip.SimpleTokenizer) or tokenizer.context_length != context:
            raise UserError(
                f"teachers.{name}: {config.model} reads captions by {type(tokenizer).__name__}, "
                f"{tokenizer.context_length} tokens; take one of byte pairs and set text.context to its length"
            )
        self.scale = float(self._model.logit_scale.exp())

    @torch.no_grad()
    def texts(self, tokens: Tensor) -> Tensor:
        return self._model.encode_text(tokens, normalize=True).float()


class ClassifierTeacher:
    """A classifier of timm; its class token stands for its logits.

    Raises:
        UserError: timm has none of that name, or the weights are not its own, of as many classes.
    """

    def __init__(self, config: DeitConfig, classes: int) -> None:
        import timm

        model, _ = timm_network.create_model(config.classifier, f"classifier: {config.classifier}", {}, classes=classes)
        state = weights.read_weights(config.checkpoint)
        try:
            model.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = f"not weights of {config.classifier} with {classes} classes: {error}".splitlines()[0]
            raise UserError(f"{config.checkpoint}: {reason}") from None
        data = timm.data.resolve_model_data_config(model)
        device = default_device()
        self._mean, self._std = (torch.tensor(data[each], device=device).view(1, 3, 1, 1) for each in ("mean", "std"))
        self._side = data["input_size"][-1]
        self._model = model.requires_grad_(False).eval().to(device)

    def __call__(self, crops: Tensor) -> Features:
        """Crops `[n, 3, S, S]`, values 0 to 1, to logits `[n, classes]`; there are no patch tokens."""
        logits = self._model((_resize(crops, self._side) - self._mean) / self._std)
        return Features(logits, logits.new_empty(len(logits), 0, logits.shape[1]))
