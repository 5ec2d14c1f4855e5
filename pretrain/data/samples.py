"""Samples of several corpora, or of what selections keep of them, as one list of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infra.artifacts.artifact import Artifact, open_artifact
from infra.corpus.corpus import BadImage, Corpus
from infra.corpus.selection import Selection
from infra.errors import UserError
from infra.hashing import hash_json
from pretrain.data.config import Sampling
from pretrain.data.images import depth_settings
from pretrain.data.sample_depth import DepthSettings
from pretrain.data.sample_order import SampleOrder


@dataclass(frozen=True)
class CorpusPart:
    """A corpus, and what a selection keeps of it."""

    corpus: Corpus
    artifact: Artifact
    """What was asked for: the corpus, or the selection."""
    kept_rows: np.ndarray | None = None
    """Rows of the corpus, int64, increasing; None: all of them"""
    weights: np.ndarray | None = None
    """float64, one for each kept row; None: all alike"""

    @classmethod
    def open(cls, url: str) -> CorpusPart:
        """Open a corpus, or a selection together with the corpus it judges.

        Raises:
            UserError: there is neither, or the selection's corpus is gone.
        """
        artifact = open_artifact(url, "corpus", "selection")
        if artifact.manifest.kind == "corpus":
            return cls(Corpus.open(url), artifact)
        selection, corpus = Selection.open(url), Corpus.open(artifact.manifest.inputs["corpus"].url)
        if len(selection.ledger) != len(corpus) or corpus.artifact.id != artifact.manifest.inputs["corpus"].id:
            raise UserError(f"{url}: judges another corpus than the one at {corpus.artifact.url}; select again")
        kept = np.flatnonzero(selection.ledger["keep"].to_numpy(zero_copy_only=False))
        weights = selection.ledger["weight"].fill_null(1).to_numpy()[kept].astype(np.float64)
        return cls(corpus, artifact, kept, weights)

    def __len__(self) -> int:
        return len(self.corpus) if self.kept_rows is None else len(self.kept_rows)

    def shard_ends(self) -> np.ndarray:
        """Kept rows after each shard, int64 `[shards]`."""
        ends = self.corpus.shard_ends
        return ends if self.kept_rows is None else np.searchsorted(self.kept_rows, ends)


class Samples:
    """Rows of all parts, one part after the other."""

    def __init__(self, parts: Sequence[CorpusPart]) -> None:
        self.parts = list(parts)
        self.ends = np.cumsum([len(part) for part in parts])
        if self.size == 0:
            raise UserError(f"{parts[0].artifact.url}: has no samples; nothing to train on")
        self._depths = [depth_settings(part.corpus) for part in parts]  # read here, not by each of the loader's workers

    @property
    def size(self) -> int:
        return int(self.ends[-1])

    def order(self, seed: int, sampling: Sampling) -> SampleOrder:
        """The order in which they are seen."""
        starts = self.ends - [len(part) for part in self.parts]
        shard_ends = np.concatenate([part.shard_ends() + start for part, start in zip(self.parts, starts, strict=True)])
        identity = int(hash_json([part.artifact.id for part in self.parts])[:16], 16)
        window = sampling.window_shards if sampling.shuffle == "shard_window" else None
        return SampleOrder(seed, identity, shard_ends, window, self._weights() if sampling.weighted else None)

    def _weights(self) -> np.ndarray:
        weights = np.concatenate([np.ones(len(p)) if p.weights is None else p.weights for p in self.parts])
        if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
            raise UserError(
                f"{self.parts[0].artifact.url}: has weights that are negative, no numbers or all 0; select again"
            )
        return weights

    def locate(self, row: int) -> tuple[Corpus, int]:
        """The corpus of a row, and the row in it."""
        number = int(np.searchsorted(self.ends, row, side="right"))
        part = self.parts[number]
        inside = row - (int(self.ends[number - 1]) if number else 0)
        return part.corpus, inside if part.kept_rows is None else int(part.kept_rows[inside])

    def read(self, rows: np.ndarray) -> list[bytes | BadImage]:
        """The encoded images of some rows, read together; in the place of one that cannot be used, why."""
        places = [self.locate(int(row)) for row in rows]
        found: dict[int, bytes | BadImage] = {}
        for corpus in {id(corpus): corpus for corpus, _ in places}.values():
            mine = [at for at, (each, _) in enumerate(places) if each is corpus]
            images = corpus.read_images([places[at][1] for at in mine])
            found.update(zip(mine, images, strict=True))
        return [found[at] for at in range(len(places))]

    def depth(self, row: int) -> DepthSettings:
        """What samples of more than 8 bits mean in the image of a row."""
        return self._depths[int(np.searchsorted(self.ends, row, side="right"))]

    def caption(self, row: int) -> str:
        corpus, inside = self.locate(row)
        return str(corpus.captions[inside].as_py())

    def label(self, row: int) -> int:
        corpus, inside = self.locate(row)
        return int(corpus.labels[inside])

    def key(self, row: int) -> str:
        corpus, inside = self.locate(row)
        return corpus.key(inside)
