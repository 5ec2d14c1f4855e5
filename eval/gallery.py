"""Galleries of the run page: what curation joined, dropped and kept, with pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from infra.artifacts import Artifact, find
from infra.corpora import Corpus
from infra.selections import Selection
from pretrain.data.decode import decode_rgb

T = TypeVar("T")

_SIDE = 96


@dataclass(frozen=True)
class Picture:
    """One thumbnail with a line under it."""

    source: str
    caption: str
    mark: str = ""
    """kept, dropped or reference: how the frame is drawn."""


@dataclass(frozen=True)
class Gallery:
    """Pictures in groups that belong together."""

    title: str
    note: str
    groups: list[list[Picture]]


@dataclass
class Shelf:
    """Corpora opened once, looked up by key."""

    _corpora: dict[str, tuple[Corpus, dict[str, int]]] = field(default_factory=dict)

    def picture(self, url: str, key: str, caption: str, mark: str) -> Picture:
        if url not in self._corpora:
            corpus = Corpus.open(url)
            self._corpora[url] = corpus, {name: row for row, name in enumerate(corpus.keys)}
        corpus, rows = self._corpora[url]
        return Picture(thumbnail(decode_rgb(corpus.read_image(rows[key]))), caption, mark)


def thumbnail(image: Image.Image) -> str:
    """A data URI of an image at most 96 pixels wide and high."""
    image = image.copy()
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=85)
    return data_uri(buffer.getvalue(), "image/webp")


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def galleries(artifact: Artifact, count: int) -> list[Gallery]:
    """The galleries of one selection."""
    selection = Selection.open(artifact.url)
    corpus_url = artifact.manifest.inputs["corpus"].url
    rows = selection.ledger.to_pylist()
    shelf = Shelf()
    steps = {step["kind"] for step in artifact.manifest.config["steps"]}
    found = []
    if "near_duplicates" in steps:
        found.append(_duplicates(rows, corpus_url, shelf, count))
    if "decontaminate" in steps:
        found.append(_leaks(rows, corpus_url, _embedded_corpora(artifact, "evaluation_"), shelf, count))
    if "retrieve" in steps:
        found += _retrieval(rows, corpus_url, _embedded_corpora(artifact, "curated"), shelf, count)
    return [gallery for gallery in found if gallery.groups]


def _embedded_corpora(artifact: Artifact, role: str) -> list[str]:
    """URLs of the corpora whose embeddings a selection compared with."""
    urls = []
    for name, each in artifact.manifest.inputs.items():
        if name.startswith(role) and (embedded := find(each.url)) is not None:
            urls.append(embedded.manifest.inputs["corpus"].url)
    return urls


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` items, evenly spread over their order."""
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)
    return [items[place] for place in dict.fromkeys(chosen.tolist())]


def _duplicates(rows: list[dict[str, Any]], url: str, shelf: Shelf, count: int) -> Gallery:
    """Groups from the most to the least certain, each with the image that stays in front."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["reason"] == "near_duplicate":
            groups.setdefault(row["winner"], []).append(row)
    ordered = sorted(groups.items(), key=lambda item: (-min(row["score"] for row in item[1]), item[0]))
    pictures = [
        [shelf.picture(url, winner, "stays", "kept")]
        + [shelf.picture(url, row["key"], f"{row['score']:.3f}", "dropped") for row in losers[:4]]
        for winner, losers in _spread(ordered, count)
    ]
    note = (
        f"{len(groups)} groups, from the most to the least alike. The first of each stays; numbers are cosines to it."
    )
    return Gallery("Near-duplicates", note, pictures)


def _leaks(rows: list[dict[str, Any]], url: str, evaluation: list[str], shelf: Shelf, count: int) -> Gallery:
    leaks = sorted((row for row in rows if row["reason"] == "leak"), key=lambda row: (-row["score"], row["key"]))
    holders = {key: each for each in evaluation for key in Corpus.open(each).keys}
    pictures = [
        [
            shelf.picture(holders[row["winner"]], row["winner"], "test", "reference"),
            shelf.picture(url, row["key"], f"{row['score']:.3f}", "dropped"),
        ]
        for row in _spread(leaks, count)
        if row["winner"] in holders
    ]
    note = f"{len(leaks)} pool images too much like an evaluation image, from the most to the least alike."
    return Gallery("Leaks from the evaluation set", note, pictures)


def _retrieval(rows: list[dict[str, Any]], url: str, seed: list[str], shelf: Shelf, count: int) -> list[Gallery]:
    kept = sorted((row for row in rows if row["reason"] == "retrieved"), key=lambda row: (-row["score"], row["key"]))
    lost = sorted(
        (row for row in rows if row["reason"] == "not_retrieved"), key=lambda row: (-row["score"], row["key"])
    )
    near = [
        [
            shelf.picture(seed[0], row["winner"], "seed", "reference"),
            shelf.picture(url, row["key"], f"{row['score']:.3f}", "kept"),
        ]
        for row in _spread(kept, count)
    ]
    far = [[shelf.picture(url, row["key"], f"{row['score']:.3f}", "dropped")] for row in _spread(lost, 2 * count)]
    return [
        Gallery("Retrieved", f"{len(kept)} pool images near the seed, each behind its nearest seed image.", near),
        Gallery("Not retrieved", f"{len(lost)} pool images that no seed image has among its nearest.", far),
    ]
