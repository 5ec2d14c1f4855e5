"""Evaluate: a backbone and its baselines by kNN and linear probe, in one run, to a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eval import knn, linear
from eval.config import EvaluateConfig
from eval.pictures import patch_pca
from eval.scores import Score, accuracy
from infra.artifacts import Artifact, Plan, produce
from infra.corpora import Corpus
from infra.errors import UserError
from pretrain import backbones
from pretrain.backbones import CheckpointedViT
from pretrain.config import BackboneConfig, CheckpointBackbone, PixelDescriptor
from pretrain.features import extract

VERSION = 1
_PIXELS = PixelDescriptor(side=32, frequencies=32, whiten=0.0)


def evaluate(config: EvaluateConfig) -> Artifact:
    """Score a backbone; return the report artifact.

    Raises:
        UserError: the backbone or a corpus is missing, or a corpus has no labels.
    """
    train, test = Corpus.open(config.train), Corpus.open(config.test)
    identity, inputs = backbones.identity(config.model)
    inputs |= {"train": train.artifact.as_input(), "test": test.artifact.as_input()}
    settings = config.model_dump(mode="json", exclude={"model", "train", "test", "out", "batch"}) | {"model": identity}
    plan = Plan("report", "evaluate", VERSION, settings, inputs)
    return produce(plan, config.out, lambda directory: _write(config, train, test, directory))


def subjects(config: EvaluateConfig) -> dict[str, BackboneConfig]:
    """What is scored: the model and, beside it, the baselines."""
    found: dict[str, BackboneConfig] = {"model": config.model}
    if config.baselines:
        if isinstance(config.model, CheckpointBackbone):
            found["untrained"] = config.model.model_copy(update={"untrained": True})
        found["pixels"] = _PIXELS
    return found


def _write(config: EvaluateConfig, train: Corpus, test: Corpus, directory: Path) -> Mapping[str, Any]:
    if train.classes != test.classes:
        raise UserError(f"{config.test}: has other classes than {config.train}; ingest both the same way")
    if len(set(train.labels)) < 2 or not len(test.labels):
        raise UserError(f"{config.train}: has one class only; a probe needs two or more")
    rows: list[Score] = []
    for name, backbone_config in subjects(config).items():
        backbone = backbones.load(backbone_config)
        rows += _score(name, backbone, config, train, test)
        if name == "model" and isinstance(backbone, CheckpointedViT):
            patch_pca(backbone, test, 10, directory / "pca.png")
    (directory / "report.json").write_text(json.dumps({"rows": [row.as_dict() for row in rows]}, indent=1))
    return {row.protocol: {each.subject: each.value for each in rows if each.protocol == row.protocol} for row in rows}


def _score(name: str, backbone: backbones.Backbone, config: EvaluateConfig, train: Corpus, test: Corpus) -> list[Score]:
    bank = extract(backbone, train, config.batch, f"evaluate {name}: train")
    queries = extract(backbone, test, config.batch, f"evaluate {name}: test")
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    nearest = knn.predict(bank, train.labels, queries, classes, config.knn_k, config.knn_temperature)
    probe = linear.predict(bank, train.labels, queries, config.linear_c, config.held_out, config.seed)
    return [
        _accuracy("knn", name, nearest, test.labels, config),
        _accuracy("linear", name, probe, test.labels, config),
    ]


def _accuracy(protocol: str, name: str, found: np.ndarray, labels: np.ndarray, config: EvaluateConfig) -> Score:
    return accuracy(protocol, name, found == labels, config.bootstrap, config.seed)
