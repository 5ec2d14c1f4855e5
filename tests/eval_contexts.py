"""Small labeled corpora and backbones with known answers, as evaluations see them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from eval.config import EvaluateConfig
from eval.context import EvalContext
from eval.data.feature_store import Extraction
from eval.eval_model import EvalModel
from infra.corpus.corpus import Corpus
from pretrain.backbones.base import Backbone, Tokens
from pretrain.backbones.config import BackboneConfig, PixelDescriptorConfig
from pretrain.backbones.preprocessing import center_crop
from tests.conftest import encode_image, ingest_folder

PIXELS = PixelDescriptorConfig(side=8, frequencies=8, whiten=0.0)


class Colors:
    """A backbone whose patch tokens are the mean colors of patches, and whose vector is that of the image."""

    side, patch, any_size = 32, 4, True

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return center_crop(image, self.side)

    def features(self, batch: Tensor) -> Tensor:
        return self.layers(batch, 1)[0]

    def get_normalized_layers(self, images: Tensor) -> Tensor:
        return images

    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        n, height, width, _ = batch.shape
        cells = batch.float().reshape(n, height // self.patch, self.patch, width // self.patch, self.patch, 3)
        patches = cells.mean((2, 4)) / 255 - 0.5
        vector = patches.mean((1, 2))
        return vector, [Tokens(vector, patches)] * blocks


def make_context(
    corpora: Mapping[str, Corpus],
    tasks: Sequence[Mapping[str, Any]],
    leaked: Mapping[str, np.ndarray] | None = None,
    **settings: Any,
) -> EvalContext:
    """Corpora by name, opened for some tasks; without pictures unless they are asked for."""
    datasets = {name: corpus.artifact.url for name, corpus in corpora.items()}
    settings = {"bootstrap": 50, "pictures": 0, **settings}
    config = EvaluateConfig(model=PIXELS, datasets=datasets, tasks=list(tasks), **settings)
    return EvalContext(dict(corpora), leaked or {}, config, {})


def make_model(
    folder: Path, config: BackboneConfig = PIXELS, backbone: Backbone | None = None, blocks: int = 1
) -> EvalModel:
    """A model under evaluation; `backbone` takes the place of what `config` would load."""
    found = EvalModel("model", config, Extraction(blocks, 1, 0, 32, 0), str(folder / "features" / "{id}"))
    if backbone is not None:
        found.__dict__["backbone"] = backbone
    return found


def samples(folder: Path, members: Mapping[str, Mapping[str, bytes]], **settings: Any) -> Corpus:
    """A corpus of samples in a shard: {key: {extension: bytes}}."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "samples.tar", "w") as shard:
        for key, files in members.items():
            for extension, data in files.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))
    return ingest_folder(folder / "samples.tar", folder / "corpus", labels="none", **settings)


def first_of(shard: Path, count: int, folder: Path) -> Corpus:
    """The first samples of a shard, a corpus of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard) as whole, tarfile.open(folder / "first.tar", "w") as part:
        keys = sorted({each.name.partition(".")[0] for each in whole.getmembers()})[:count]
        for each in whole.getmembers():
            if each.name.partition(".")[0] in keys:
                part.addfile(each, whole.extractfile(each))
    return ingest_folder(folder / "first.tar", folder / "corpus")


def png(values: np.ndarray) -> bytes:
    return encode_image(Image.fromarray(values))


def tinted(folder: Path, count: int, seed: int, classes: int = 3) -> Corpus:
    """Images in class folders; each class is a color with much noise."""
    rng = np.random.default_rng(seed)
    colors = np.random.default_rng(99).integers(60, 200, (classes, 3))
    for number in range(count):
        name = number % classes
        values = colors[name] + rng.normal(scale=30, size=3) + rng.normal(scale=60, size=(16, 16, 3))
        path = folder / "images" / f"class{name}" / f"{seed}-{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(values.clip(0, 255).astype(np.uint8)))
    return ingest_folder(folder / "images", folder / "corpus")


def unit(seed: int, n: int, dim: int = 6) -> np.ndarray:
    """Random vectors of unit length, float32."""
    vectors = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
