"""Embed: a corpus to vectors, in one streaming pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curation.config import EmbedConfig
from infra import embeddings
from infra.artifacts import Artifact, Plan, produce
from infra.corpora import Corpus
from pretrain import backbones
from pretrain.features import stream

VERSION = 2
_PART_ROWS = 65_536


def embed(config: EmbedConfig) -> Artifact:
    """Embed every image of a corpus; return the embeddings artifact.

    Raises:
        UserError: the corpus or the backbone is missing.
    """
    corpus = Corpus.open(config.corpus)
    settings, inputs = backbones.identity(config.backbone)
    plan = Plan("embeddings", "embed", VERSION, settings, {"corpus": corpus.artifact.as_input(), **inputs})

    def write(directory: Path) -> Mapping[str, Any]:
        backbone = backbones.load(config.backbone)
        batches = stream(backbone, corpus, config.batch, "embed")
        dim = embeddings.write(directory, corpus.table["key"], embeddings.regroup(batches, _PART_ROWS))
        return {"images": len(corpus), "dim": dim}

    return produce(plan, config.out, write)
