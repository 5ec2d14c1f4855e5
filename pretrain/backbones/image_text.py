"""Images and texts in one space: CLIP and SigLIP models of any origin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from infra.errors import UserError
from pretrain.backbones import weight_files
from pretrain.backbones.base import Backbone, default_device
from pretrain.backbones.checkpoint_backbone import CheckpointBackbone
from pretrain.backbones.config import (
    BackboneConfig,
    CheckpointBackboneConfig,
    OpenClipBackboneConfig,
    TransformersBackboneConfig,
)
from pretrain.backbones.open_clip_backbone import OpenClipBackbone
from pretrain.backbones.transformers_backbone import TransformersBackbone
from pretrain.checkpoint.artifact import Checkpoint
from pretrain.objectives.base import BackboneWidths
from pretrain.objectives.build import build_objectives
from pretrain.objectives.config import ClipConfig, SiglipConfig
from pretrain.objectives.image_text import ImageText, tokenizer


class ImageTextModel(Protocol):
    """What brings images and texts into one space, in which they are compared by their cosines."""

    def project(self, vectors: Tensor) -> Tensor:
        """What its `Backbone.features` gives, `[n, dim]`, to vectors of unit length in the space of texts."""

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts to vectors of unit length, float32 `[n, dim]`."""


def has_texts(config: BackboneConfig) -> bool:
    """Whether a model has a text tower."""
    if isinstance(config, CheckpointBackboneConfig):
        return not config.untrained and bool(_objectives(Checkpoint.open(config.url)))
    if isinstance(config, TransformersBackboneConfig):
        file = weight_files.resolve_weights(config) / "config.json"
        return file.is_file() and "text_config" in json.loads(file.read_text())
    return isinstance(config, OpenClipBackboneConfig)


def _objectives(checkpoint: Checkpoint) -> list[ClipConfig | SiglipConfig]:
    return [each for each in checkpoint.description.objectives if isinstance(each, ClipConfig | SiglipConfig)]


def towers_of(checkpoint: Checkpoint, backbone: BackboneWidths) -> ImageText | None:
    """The projection and the text tower of a checkpoint, frozen, if it was trained with captions.

    Args:
        backbone: the checkpoint's.
    """
    pairs = _objectives(checkpoint)
    if not pairs:
        return None
    towers = build_objectives(pairs[:1], backbone, backbone)[pairs[0].kind]
    assert isinstance(towers, ImageText)
    towers.load_state_dict(checkpoint.weights(f"objectives.{pairs[0].kind}."))
    return towers.requires_grad_(False).eval()


def load(config: BackboneConfig, backbone: Backbone | None = None) -> ImageTextModel:
    """Load what brings images and texts into one space onto the GPU, if there is one.

    Args:
        backbone: the same model, if it has been loaded.

    Raises:
        UserError: it has no text tower.
    """
    if isinstance(config, OpenClipBackboneConfig):
        return _OpenClip(config, backbone)
    if isinstance(config, TransformersBackboneConfig):
        return _Transformers(config, backbone)
    if isinstance(config, CheckpointBackboneConfig):
        return _Checkpointed(config, backbone)
    raise UserError(f"kind {config.kind}: has no text tower; give a model of open_clip, transformers, or a checkpoint")


class _OpenClip:
    def __init__(self, config: OpenClipBackboneConfig, backbone: Backbone | None) -> None:
        import open_clip

        self.model = (backbone if isinstance(backbone, OpenClipBackbone) else OpenClipBackbone(config)).model
        self._tokenize: Any = open_clip.get_tokenizer(config.model)

    def project(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        found = self.model.encode_text(self._tokenize(list(texts)).to(default_device()), normalize=True)
        return found.float().cpu().numpy()


class _Checkpointed:
    """The projection and the text tower of a Fovea checkpoint's objective."""

    def __init__(self, config: CheckpointBackboneConfig, backbone: Backbone | None) -> None:
        checkpoint = Checkpoint.open(config.url)
        model = backbone.model if isinstance(backbone, CheckpointBackbone) else checkpoint.backbone()
        towers = None if config.untrained else towers_of(checkpoint, model)
        if towers is None:
            raise UserError(f"{config.url}: has no trained text tower; pretrain with the objective clip or siglip")
        self._objective = towers.to(default_device())
        self._tokenize = tokenizer(towers.config.text)

    @torch.inference_mode()
    def project(self, vectors: Tensor) -> Tensor:
        return self._objective.encode_images(vectors.to(default_device())).float().cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        return self._objective.encode_texts(self._tokenize(texts).to(default_device())).cpu().numpy()


class _Transformers:
    def __init__(self, config: TransformersBackboneConfig, backbone: Backbone | None) -> None:
        from transformers import AutoTokenizer

        backbone = backbone if isinstance(backbone, TransformersBackbone) else TransformersBackbone(config)
        self.model: Any = backbone.whole
        if not hasattr(self.model, "get_text_features"):
            raise UserError(f"{config.checkpoint}: has no text tower; give a CLIP or SigLIP model")
        self._tokenize: Any = AutoTokenizer.from_pretrained(backbone.folder, local_files_only=True)

    @torch.inference_mode()
    def project(self, vectors: Tensor) -> Tensor:
        if hasattr(self.model, "visual_projection"):  # CLIP's; SigLIP has none
            vectors = self.model.visual_projection(vectors.to(default_device())).float().cpu()
        return F.normalize(vectors, dim=1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        longest = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": longest, "return_tensors": "pt"}
        found = self.model.get_text_features(**self._tokenize(list(texts), **options).to(default_device()))
        vectors = getattr(found, "pooler_output", found)  # some versions of transformers give an output
        return F.normalize(vectors.float(), dim=1).cpu().numpy()
