"""Materialize: the kept images of a selection as a corpus of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from curation.config import MaterializeConfig
from curation.face_blur import FaceBlurrer
from infra.artifacts.artifact import Artifact, ArtifactSpec, get_or_create
from infra.artifacts.manifest import ArtifactRef
from infra.corpus.corpus import DECODING, Corpus
from infra.corpus.selection import Selection
from infra.corpus.writer import CorpusWriter
from infra.hashing import hash_url
from infra.progress import progress
from pretrain.data.images import depth_settings

VERSION = 2


def materialize(config: MaterializeConfig) -> Artifact:
    """Write the kept images of a selection as a corpus, byte for byte unless faces are blurred; return it.

    Raises:
        UserError: the selection is not one over the corpus.
    """
    corpus, selection = _open_inputs(config)

    def write(directory: Path) -> Mapping[str, Any]:
        return _write(config, corpus, selection, directory)

    return get_or_create(_spec(config, corpus, selection), config.out, write, restart=config.restart)


def corpus_spec(config: MaterializeConfig) -> ArtifactSpec:
    """The corpus that a configuration asks for.

    Raises:
        UserError: the selection is not one over the corpus.
    """
    return _spec(config, *_open_inputs(config))


def _open_inputs(config: MaterializeConfig) -> tuple[Corpus, Selection]:
    corpus, selection = Corpus.open(config.corpus), Selection.open(config.selection)
    selection.require_keys(corpus.table["key"], config.corpus)
    return corpus, selection


def _spec(config: MaterializeConfig, corpus: Corpus, selection: Selection) -> ArtifactSpec:
    inputs = {"corpus": corpus.artifact.as_ref(), "selection": selection.artifact.as_ref()}
    settings: dict[str, Any] = {"shard_mb": config.shard_mb}
    blur = config.blur_faces
    if blur is not None:
        unread = {"model", "min_score" if blur.model is None else "min_share"}
        settings["blur_faces"] = blur.model_dump(mode="json", exclude=unread)
        if blur.model is not None:
            inputs["face_model"] = ArtifactRef(id=hash_url(blur.model)[1], url=blur.model)
    return ArtifactSpec("corpus", "materialize", VERSION, settings, inputs)


def _write(config: MaterializeConfig, corpus: Corpus, selection: Selection, directory: Path) -> Mapping[str, Any]:
    redact = FaceBlurrer(config.blur_faces, depth_settings(corpus)).blur if config.blur_faces is not None else None
    writer = CorpusWriter(directory, config.shard_mb << 20)
    kept = np.flatnonzero(selection.ledger["keep"].to_numpy(zero_copy_only=False))
    blurred = 0
    with progress("materialize", len(kept)) as advance:
        for row in kept:
            blurred += writer.copy(corpus, int(row), redact)
            advance()
    writer.finish()
    (directory / DECODING).write_text(json.dumps(corpus.decoding))
    told = {"images": len(kept), "classes": corpus.classes}
    return told if redact is None else told | {"blurred": blurred}
