"""A backbone under evaluation, with its features."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from eval.frozen import Extraction, Frozen, freeze
from eval.grids import Grids
from infra.artifacts import cache_directory
from infra.corpora import Corpus
from pretrain import backbones, image_text
from pretrain.backbones import Backbone, TokenBackbone
from pretrain.config import BackboneConfig
from pretrain.image_text import ImageTextModel


@dataclass
class Subject:
    """What is scored: the model, or a baseline."""

    name: str
    config: BackboneConfig
    how: Extraction
    features: str
    """URL below which features are kept."""
    grids: dict[tuple[str, int], Grids] = field(default_factory=dict)
    """Patch tokens by corpus id and side."""
    _frozen: dict[tuple[str, int], Frozen] = field(default_factory=dict)
    """By corpus id and views."""

    @cached_property
    def backbone(self) -> Backbone:
        return backbones.load(self.config)

    @cached_property
    def pair(self) -> ImageTextModel:
        """Its text tower."""
        return image_text.load(self.config, self.backbone)

    def tokens(self, task: str) -> TokenBackbone:
        """The backbone, known to have patch tokens.

        Raises:
            UserError: it has none.
        """
        return backbones.with_tokens(self.backbone, task)

    def scratch(self, shape: tuple[int, ...]) -> np.ndarray:
        """Room for patch tokens, float16, in a nameless file: they may be more than memory holds."""
        with tempfile.TemporaryFile(dir=cache_directory()) as file:
            return np.memmap(file, dtype=np.float16, mode="w+", shape=shape)

    def frozen(self, corpus: Corpus, views: int = 1) -> Frozen:
        """Features of a dataset."""
        known = (corpus.artifact.id, views)
        if known not in self._frozen:
            how, title = replace(self.how, views=views), f"features of {self.name}"
            self._frozen[known] = freeze(self.backbone, self.config, corpus, how, self.features, title)
        return self._frozen[known]

    def vectors(self, corpus: Corpus) -> np.ndarray:
        """Vectors of a dataset at unit length, float32 `[n, dim]`."""
        return self.frozen(corpus).vectors()

    def joint(self, corpus: Corpus) -> np.ndarray:
        """Vectors of a dataset in the space of texts, at unit length, float32 `[n, dim]`."""
        return self.pair.project(torch.from_numpy(self.frozen(corpus).raw())).numpy()
