"""MAE and CLIP learn on real images and captions: losses fall, and zero-shot names unseen images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pretrain
from curation.config import IngestConfig
from curation.ingest.ingest import ingest
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from pretrain.backbones.config import CheckpointBackboneConfig
from pretrain.backbones.features import extract
from pretrain.backbones.registry import load_backbone
from pretrain.checkpoint.artifact import Checkpoint
from pretrain.config import PretrainConfig
from pretrain.monitoring.metrics_log import METRICS
from pretrain.objectives.config import ClipConfig, SiglipConfig
from pretrain.objectives.image_text import Clip, Siglip, tokenizer
from tests.conftest import image_folder, ingest_folder

pytestmark = pytest.mark.slow

MODEL = {
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 8,
    "image_size": 32,
    "layer_scale_init": None,
    "init_std": 0.1,
}
PLAIN = {"jitter_prob": 0.0, "grayscale_prob": 0.0}
VIEWS = {
    "global_crops": {"size": 32, "scale": [0.5, 1.0], "photometric": [PLAIN]},
    "num_global_crops": 1,
    "num_local_crops": 0,
}
TEXT = {"context": 16, "width": 64, "num_heads": 2, "layers": 2}
WORDS = ["face", "arrow", "letter", "heart", "moon", "square", "hand", "symbol"]


def trained(corpus: str, out: Path, objectives: list[dict[str, Any]], **settings: Any) -> Checkpoint:
    """In this process, plainly, so that the tests of engines need not be paid for again."""
    values = {
        "model": MODEL,
        "views": VIEWS | {"mask_probability": 0.0},
        "schedule": {"steps": 200, "global_batch_size": 64},
        "optimizer": {"base_lr": 1e-3, "lr_scaling": "none", "warmup_steps": 20, "weight_decay": [0.1, 0.1]},
        "teacher": {"momentum": [0.0, 0.0]},
        "sharding": {"backend": "torch"},
        "runtime": {"num_workers": 1},
    } | settings
    config = PretrainConfig.model_validate(values | {"corpora": [corpus], "objectives": objectives, "out": str(out)})
    return Checkpoint.open(pretrain.run(config).url)


def terms(checkpoint: Checkpoint, name: str) -> tuple[float, float]:
    """A loss in the first and in the last steps."""
    lines = checkpoint.artifact.read_bytes(METRICS).decode().splitlines()
    rows = [json.loads(line)[name] for line in lines]
    return float(np.mean(rows[:5])), float(np.mean(rows[-20:]))


@pytest.fixture(scope="module")
def emoji(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("emoji")
    return {
        split: ingest(
            IngestConfig(
                source=str(shared_data / "noto_emoji" / f"{split}-000000.tar"), labels="none", out=str(root / split)
            )
        ).url
        for split in ("train", "test")
    }


@dataclass
class Encoded:
    """Unseen images and any texts in the space a training has made."""

    captions: list[str]
    images: Tensor
    texts: Callable[[list[str]], Tensor]


def encoded(checkpoint: Checkpoint, kind: type[Clip] | type[Siglip], url: str) -> Encoded:
    corpus = Corpus.open(url)
    objective = checkpoint.description.objectives[0]
    assert isinstance(objective, ClipConfig | SiglipConfig)
    dims = checkpoint.backbone()
    head = kind(objective, dims, dims).requires_grad_(False).eval()
    head.load_state_dict(checkpoint.weights(f"objectives.{objective.kind}."))
    tokens = extract(
        load_backbone(CheckpointBackboneConfig(url=checkpoint.artifact.url)), corpus, 256, "zero-shot"
    ).copy()
    tokenize = tokenizer(objective.text)
    images = head.encode_images(torch.from_numpy(tokens))
    return Encoded(corpus.captions.to_pylist(), images, lambda texts: head.encode_texts(tokenize(texts)))


def zero_shot_accuracy(space: Encoded) -> float:
    """Mean over the words of the share of images that are given their own word."""
    named = [[word for word in WORDS if word in caption.lower().split()] for caption in space.captions]
    rows = [row for row, words in enumerate(named) if len(words) == 1]
    truth = torch.tensor([WORDS.index(named[row][0]) for row in rows])
    right = (space.images[rows] @ space.texts(WORDS).T).argmax(1) == truth
    return float(torch.stack([right[truth == word].float().mean() for word in truth.unique()]).mean())


def recall_at_10(space: Encoded) -> float:
    """Share of images whose caption is among the ten nearest."""
    likeness = space.images @ space.texts(space.captions).T
    better = (likeness > likeness.diagonal()[:, None]).sum(1)
    return float((better < 10).float().mean())


def test_mae_learns_to_fill_in(emoji: dict[str, str], tmp_path: Path) -> None:
    objective = {"kind": "mae", "embed_dim": 48, "depth": 1, "num_heads": 2}
    model = MODEL | {"pos_embed": "sincos", "init": "xavier"}
    checkpoint = trained(emoji["train"], tmp_path, [objective], model=model)
    first, last = terms(checkpoint, "mae")
    assert last < 0.8 * first


@pytest.mark.parametrize(("kind", "objective"), [("clip", Clip), ("siglip", Siglip)])
def test_images_and_captions_meet(
    emoji: dict[str, str], tmp_path: Path, kind: str, objective: type[Clip] | type[Siglip]
) -> None:
    checkpoint = trained(
        emoji["train"],
        tmp_path,
        [{"kind": kind, "embed_dim": 64, "text": TEXT}],
        schedule={"steps": 350, "global_batch_size": 64},
    )
    first, last = terms(checkpoint, kind)
    assert last < 0.7 * first
    space = encoded(checkpoint, objective, emoji["test"])
    assert zero_shot_accuracy(space) > 1.5 / len(WORDS)
    assert recall_at_10(space) > 2 * 10 / len(space.captions)


def test_clip_and_dino_train_together(emoji: dict[str, str], tmp_path: Path) -> None:
    head = {"hidden_dim": 64, "bottleneck_dim": 32, "num_prototypes": 64, "init_std": 0.1}
    objectives = [{"kind": "clip", "embed_dim": 64, "text": TEXT}, {"kind": "dino", "head": head}, {"kind": "koleo"}]
    checkpoint = trained(
        emoji["train"],
        tmp_path,
        objectives,
        views=VIEWS | {"num_global_crops": 2},
        teacher={"momentum": [0.9, 1.0], "temperature": [0.04, 0.04]},
    )
    for name in ("clip", "dino_global"):
        first, last = terms(checkpoint, name)
        assert last < 0.9 * first, name


def test_a_corpus_without_captions_is_named(tmp_path: Path) -> None:
    corpus = ingest_folder(image_folder(tmp_path / "images", 3), tmp_path / "corpus")
    with pytest.raises(UserError, match="samples without a caption"):
        trained(corpus.artifact.url, tmp_path / "out", [ClipConfig(embed_dim=8).model_dump()])
