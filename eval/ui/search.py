"""Images of a corpus that are like an image or a text, by the backbone that embedded it."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from infra.artifacts.artifact import Artifact
from infra.compute.sharded_array import l2_normalize
from infra.compute.vector_search import knn_search
from infra.corpus.corpus import BadImage, Corpus
from infra.corpus.embeddings import Embeddings, backbone_fingerprint
from infra.errors import UserError
from pretrain.backbones.config import BackboneConfig
from pretrain.data.images import decode_image, read_images

_BLOCK = 1 << 17  # rows compared at once


@dataclass(frozen=True)
class Hit:
    """A row of the corpus and how like the query it is."""

    row: int
    key: str
    caption: str
    score: float


class Searcher:
    """Searches one embeddings artifact exactly, reading its vectors in blocks. Models are loaded when first needed."""

    def __init__(self, artifact: Artifact) -> None:
        self.embeddings = Embeddings.from_artifact(artifact)
        self.corpus = Corpus.open(artifact.manifest.inputs["corpus"].url)
        self._lock = threading.Lock()

    @cached_property
    def config(self) -> Any:
        """The backbone's settings, with places where its inputs are.

        Raises:
            UserError: they are those of another version.
        """
        manifest = self.embeddings.artifact.manifest
        settings = {name: value for name, value in manifest.config.items() if name != "preprocessing"}
        if "backbone" in manifest.inputs:
            place = {"checkpoint": "url"}.get(settings["kind"], "checkpoint")
            settings[place] = manifest.inputs["backbone"].url
        if "code" in manifest.inputs:
            settings["repository"] = manifest.inputs["code"].url
        try:
            return TypeAdapter(BackboneConfig).validate_python(settings)
        except ValidationError:
            raise UserError(
                f"{self.embeddings.artifact.url}: its backbone cannot be loaded again; embed with a trained one"
            ) from None

    @cached_property
    def has_texts(self) -> bool:
        """Whether the backbone compares images with texts."""
        from pretrain.backbones.image_text import has_texts

        try:
            return has_texts(self.config)
        except UserError:  # it is gone; the vectors can still be compared with one another
            return False

    def search_by_row(self, row: int, count: int) -> list[Hit]:
        """Images like one of the corpus, that one first."""
        return self._found(self.embeddings.vectors.take(np.array([row])).astype(np.float32), count)

    def search_by_image(self, data: bytes, count: int) -> list[Hit]:
        """Images like the one in a file's bytes.

        Raises:
            UserError: they are no image that can be read.
        """
        import torch

        image = decode_image(self.corpus, data)
        if isinstance(image, BadImage):
            raise UserError(f"image: {image.reason}; give a JPEG, PNG or WebP file")
        with self._lock:
            vectors = self._backbone.features(torch.as_tensor(np.array(self._backbone.preprocess(image)))[None])
        return self._found(l2_normalize(vectors.numpy()), count)

    def search_by_text(self, text: str, count: int) -> list[Hit]:
        """Images that a text describes.

        Raises:
            UserError: the backbone knows no texts.
        """
        with self._lock:
            return self._found(self._texts.texts([text]), count, projected=True)

    def row_of(self, key: str) -> int | None:
        """The row of a key."""
        import pyarrow.compute as pc

        row = pc.index(self.corpus.table["key"], key).as_py()
        return int(row) if row >= 0 else None

    @cached_property
    def _backbone(self) -> Any:
        from pretrain.backbones import registry
        from pretrain.backbones.identity import backbone_identity

        if backbone_fingerprint(*backbone_identity(self.config)) != self.embeddings.backbone:
            raise UserError(f"{self.embeddings.artifact.url}: its backbone is no longer what it was; embed again")
        return registry.load_backbone(self.config)

    @cached_property
    def _texts(self) -> Any:
        from pretrain.backbones import image_text

        return image_text.load(self.config, self._backbone)

    def _found(self, query: np.ndarray, count: int, projected: bool = False) -> list[Hit]:
        best: list[tuple[float, int]] = []
        vectors = self.embeddings.vectors
        for start in range(0, len(vectors), _BLOCK):
            block = vectors.take(np.arange(start, min(start + _BLOCK, len(vectors)))).astype(np.float32)
            if projected:
                block = self._projected(block)
            scores, rows = knn_search(query, block, min(count, len(block)))
            best += [(float(score), int(row) + start) for score, row in zip(scores[0], rows[0], strict=True)]
            best = sorted(best, key=lambda each: (-each[0], each[1]))[:count]
        return [self._hit(row, score) for score, row in best]

    def _projected(self, block: np.ndarray) -> np.ndarray:
        """Vectors of images brought into the space of texts."""
        import torch

        return np.asarray(self._texts.project(torch.from_numpy(block)).numpy(), dtype=np.float32)

    def _hit(self, row: int, score: float) -> Hit:
        entry = self.corpus.table.slice(row, 1).to_pylist()[0]
        return Hit(row, entry["key"], entry["caption"] or "", score)


def thumbnails(corpus: Corpus, rows: Sequence[int], side: int) -> list[bytes]:
    """Images of a corpus at most `side` pixels wide and high, as WebP; gray where one cannot be read."""
    found = []
    for image in read_images(corpus, rows):
        if isinstance(image, BadImage):
            image = Image.new("RGB", (side, side), "lightgray")
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=85)
        found.append(buffer.getvalue())
    return found
