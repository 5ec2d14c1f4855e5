"""A backbone under evaluation, with its features."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from eval.data.feature_store import Extraction, FrozenFeatures, get_or_create_features
from eval.data.patch_tokens import PatchTokenGrids
from infra.artifacts.artifact import cache_directory
from infra.corpus.corpus import Corpus
from pretrain.backbones import base, image_text, registry
from pretrain.backbones.base import Backbone, TokenBackbone
from pretrain.backbones.config import BackboneConfig
from pretrain.backbones.image_text import ImageTextModel


@dataclass
class EvalModel:
    """What is scored: the model, or a baseline."""

    name: str
    config: BackboneConfig
    extraction: Extraction
    features_url: str
    """URL below which features are kept."""
    token_grids: dict[tuple[str, int], PatchTokenGrids] = field(default_factory=dict)
    """Patch tokens by corpus id and side."""
    _features: dict[tuple[str, int], FrozenFeatures] = field(default_factory=dict)
    """By corpus id and views."""

    @cached_property
    def backbone(self) -> Backbone:
        return registry.load_backbone(self.config)

    @cached_property
    def text_model(self) -> ImageTextModel:
        """Its text tower."""
        return image_text.load(self.config, self.backbone)

    def token_backbone(self, task: str) -> TokenBackbone:
        """The backbone, known to have patch tokens.

        Raises:
            UserError: it has none.
        """
        return base.require_tokens(self.backbone, task)

    def allocate_scratch(self, shape: tuple[int, ...]) -> np.ndarray:
        """Room for patch tokens, float16, in a nameless file: they may be more than memory holds."""
        with tempfile.TemporaryFile(dir=cache_directory()) as file:
            return np.memmap(file, dtype=np.float16, mode="w+", shape=shape)

    def features_of(self, corpus: Corpus, views: int = 1) -> FrozenFeatures:
        """Features of a dataset."""
        known = (corpus.artifact.id, views)
        if known not in self._features:
            how, title = replace(self.extraction, views=views), f"features of {self.name}"
            self._features[known] = get_or_create_features(
                self.backbone, self.config, corpus, how, self.features_url, title
            )
        return self._features[known]

    def vectors(self, corpus: Corpus) -> np.ndarray:
        """Vectors of a dataset at unit length, float32 `[n, dim]`."""
        return self.features_of(corpus).vectors()

    def joint_vectors(self, corpus: Corpus) -> np.ndarray:
        """Vectors of a dataset in the space of texts, at unit length, float32 `[n, dim]`."""
        return self.text_model.project(torch.from_numpy(self.features_of(corpus).raw())).numpy()
