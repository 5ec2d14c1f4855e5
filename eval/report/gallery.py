"""Pictures in groups, as pages show them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import pyarrow.compute as pc
from PIL import Image

from infra.corpus.corpus import BadImage, Corpus
from pretrain.data.images import read_images

_SIDE = 96


@dataclass(frozen=True)
class Picture:
    """One thumbnail with a line under it."""

    source: str
    caption: str
    mark: str = ""
    """kept, dropped or reference: how the frame is drawn."""
    key: str = ""
    """Of the image in its corpus."""


@dataclass(frozen=True)
class Gallery:
    """Pictures in groups that belong together."""

    title: str
    note: str
    groups: list[list[Picture]]


@dataclass
class Shelf:
    """Corpora opened once, looked up by key."""

    _corpora: dict[str, Corpus] = field(default_factory=dict)

    def corpus(self, url: str) -> Corpus:
        if url not in self._corpora:
            self._corpora[url] = Corpus.open(url)
        return self._corpora[url]

    def holder(self, urls: list[str], key: str) -> str | None:
        """The first corpus that has a key."""
        return next((url for url in urls if self._row(url, key) >= 0), None)

    def picture(self, url: str, key: str, caption: str, mark: str) -> Picture:
        return self.picture_of_row(url, self._row(url, key), caption, mark)

    def picture_of_row(self, url: str, row: int, caption: str, mark: str) -> Picture:
        (image,) = read_images(self.corpus(url), [row])
        if isinstance(image, BadImage):
            image = Image.new("RGB", (_SIDE, _SIDE), "lightgray")
        return Picture(thumbnail(image), caption, mark, self.corpus(url).key(row))

    def _row(self, url: str, key: str) -> int:
        return int(pc.index(self.corpus(url).table["key"], key).as_py())


def thumbnail(image: Image.Image) -> str:
    """A data URI of an image at most 96 pixels wide and high."""
    image = image.copy()
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=85)
    return data_uri(buffer.getvalue(), "image/webp")


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
