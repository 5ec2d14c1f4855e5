"""Embed: a corpus to vectors, in one streaming pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from curation.config import EmbedConfig
from infra import embeddings
from infra.artifacts import Artifact, Plan, produce
from infra.corpora import Corpus
from infra.progress import progress
from pretrain import backbones
from pretrain.features import of_rows

VERSION = 3
_PART_ROWS = 1 << 14


def embed(config: EmbedConfig) -> Artifact:
    """Embed every image of a corpus; return the embeddings artifact. An interrupted pass goes on after its last part.

    Raises:
        UserError: the corpus or the backbone is missing.
    """
    corpus = Corpus.open(config.corpus)
    settings, inputs = backbones.identity(config.backbone)
    plan = Plan("embeddings", "embed", VERSION, settings, {"corpus": corpus.artifact.as_input(), **inputs})
    return produce(plan, config.out, lambda directory: _write(config, corpus, directory), keep_work=True)


def _write(config: EmbedConfig, corpus: Corpus, directory: Path) -> Mapping[str, Any]:
    parts = [range(start, min(start + _PART_ROWS, len(corpus))) for start in range(0, len(corpus), _PART_ROWS)]
    left = [number for number in range(len(parts)) if not embeddings.part_path(directory, number).exists()]
    done = len(corpus) - sum(len(parts[number]) for number in left)
    backbone = backbones.load(config.backbone)
    with progress("embed", len(corpus), done) as advance:
        for number in left:
            found = []
            for features in of_rows(backbone, corpus, parts[number], config.batch):
                found.append(features)
                advance(len(features))
            embeddings.write_part(directory, number, np.concatenate(found))
    embeddings.write_keys(directory, corpus.table["key"])
    dim = np.load(embeddings.part_path(directory, 0), mmap_mode="r", allow_pickle=False).shape[1]
    return {"images": len(corpus), "dim": dim}
