"""Reading one unit of a source: every sample checked, hashed and noted, or turned away with the reason."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from curation.config import IngestSettings
from curation.sources import BrokenShard, Member, Sample, Unit
from infra.corpora import INDEX_SCHEMA, REJECTED_SCHEMA
from infra.files import remove_unused
from infra.hashing import hash_json
from infra.shards import ParquetRows
from pretrain.data.decode import ImageRejected, decode_rgb, open_image, upright_size

VERSION = 1
_ROWS, _REJECTED, _FACTS = "rows.parquet", "rejected.parquet", "facts.json"
PART_SCHEMA = pa.schema(
    [each for each in INDEX_SCHEMA if each.name != "shard"]
    + [pa.field("class", pa.string()), pa.field("key_hash", pa.uint64()), pa.field("ordinal", pa.int64())]
)


@dataclass
class Facts:
    """What is known of a unit that was read."""

    sha256: str
    """Of a shard's bytes; of names and contents of loose files"""
    images: int = 0
    bytes: int = 0
    """Of the images"""
    classes: list[str] = field(default_factory=list)
    unclassed: int = 0
    """Images without a class"""
    rejected: dict[str, int] = field(default_factory=dict)


class Scans:
    """Units that were read, kept on disk, each in a folder that appears when it is whole.

    A unit is known by its files' names, places, sizes and stamps and by the settings, so that nothing is read twice;
    what has no stamp is known by the run alone. What was not used for a month is forgotten.
    """

    def __init__(self, directory: Path, settings: IngestSettings, run: str) -> None:
        self.directory, self.settings, self.run = directory, settings, run
        directory.mkdir(parents=True, exist_ok=True)
        remove_unused(directory)

    def _folder(self, unit: Unit) -> Path:
        files = [(file.name, file.url, file.bytes, file.stamp or self.run) for file in unit.files]
        decisive = self.settings.model_dump(mode="json", exclude={"shard_mb"})
        return self.directory / hash_json([VERSION, decisive, unit.name, unit.classes, files])

    def facts(self, unit: Unit) -> Facts | None:
        """What is known of a unit; None if it has not been read."""
        folder = self._folder(unit)
        try:
            os.utime(folder)
            return Facts(**json.loads((folder / _FACTS).read_text()))
        except FileNotFoundError:
            return None

    def rows(self, unit: Unit) -> Path:
        """The file of a unit's rows."""
        return self._folder(unit) / _ROWS

    def rejected(self, unit: Unit) -> Path:
        """The file of what was turned away."""
        return self._folder(unit) / _REJECTED

    def scan(self, unit: Unit, advance: Callable[[], None] = lambda: None) -> Facts:
        """Read a unit and keep what is found."""
        work = Path(tempfile.mkdtemp(dir=self.directory, prefix="."))
        try:
            facts = _read(unit, self.settings, work, advance)
            (work / _FACTS).write_text(json.dumps(asdict(facts)))
            try:
                work.rename(self._folder(unit))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise  # else another process has read the same meanwhile
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return facts

    def forget_unstamped(self, units: Sequence[Unit]) -> None:
        """Remove what no later run will know again."""
        for unit in units:
            if any(file.stamp is None for file in unit.files):
                shutil.rmtree(self._folder(unit), ignore_errors=True)


def _read(unit: Unit, settings: IngestSettings, directory: Path, advance: Callable[[], None]) -> Facts:
    rows, rejected = ParquetRows(directory / _ROWS, PART_SCHEMA), ParquetRows(directory / _REJECTED, REJECTED_SCHEMA)
    digest = hashlib.sha256()
    intake = Intake(settings, rejected)
    classes: set[str] = set()
    facts = Facts("")
    try:
        for ordinal, sample in enumerate(unit.samples(settings.max_file_mb << 20, digest)):
            row = intake.accept(sample)
            if row is not None:
                rows.add(row | {"ordinal": ordinal})
                facts.images, facts.bytes = facts.images + 1, facts.bytes + row["image"]["size"]
                facts.unclassed += row["class"] is None
                classes |= {row["class"]} - {None}
            advance()
    except BrokenShard:
        intake.reject(unit.name, "broken_shard", unit.bytes)
    rows.close()
    rejected.close()
    facts.sha256, facts.classes, facts.rejected = (
        digest.hexdigest(),
        sorted(classes),
        dict(sorted(intake.counts.items())),
    )
    return facts


@dataclass
class Intake:
    """Checks samples one by one and notes those it turns away."""

    settings: IngestSettings
    rejected: ParquetRows
    counts: Counter[str] = field(default_factory=Counter)
    _keys: set[int] = field(default_factory=set)

    def accept(self, sample: Sample) -> dict[str, Any] | None:
        """The part's columns of a usable sample, or None, with the reason noted."""
        image = sample.image()
        if image is None:
            self.reject(sample.key, "no_image", sum(each.size for each in sample.members))
            return None
        key_hash = int.from_bytes(hashlib.blake2b(sample.key.encode("utf-8", "replace"), digest_size=8).digest(), "big")
        reason, size = self._look(sample.key, key_hash, image)
        if size is None or image.data is None:
            self.reject(sample.key, reason, image.size)
            return None
        self._keys.add(key_hash)
        others = [each for each in sample.members if each is not image and each.data is not None]
        for each in sample.members:
            if each.data is None:
                self.reject(each.name, "too_many_bytes", each.size)
        caption = sample.text("txt")
        if caption is None and any(each.extension == "txt" for each in others):
            self.reject(f"{sample.key}.txt", "caption_not_utf8", 0)
        return {
            "key": sample.key,
            "key_hash": key_hash,
            "image": _place(image),
            "members": [_place(each) for each in others],
            "width": size[0],
            "height": size[1],
            "sha256": hashlib.sha256(image.data).hexdigest(),
            "label": _label(sample),
            "class": self._class(sample),
            "caption": caption,
        }

    def _look(self, key: str, key_hash: int, image: Member) -> tuple[str, tuple[int, int] | None]:
        """Width and height, or the reason why the image cannot be used."""
        if key_hash in self._keys:
            return "duplicate_key", None
        if not key.isprintable() or ".." in key.split("/"):
            return "unsafe_key", None
        if image.data is None:
            return "too_many_bytes", None
        try:
            size = self._size(image.data)
        except ImageRejected as error:
            return error.reason, None
        return ("too_small", None) if min(size) < self.settings.min_side else ("", size)

    def _size(self, data: bytes) -> tuple[int, int]:
        if self.settings.check == "pixels":
            return decode_rgb(data, self.settings.max_pixels).size
        image: Image.Image = open_image(data, self.settings.max_pixels)
        return upright_size(image)

    def _class(self, sample: Sample) -> str | None:
        if self.settings.labels == "json":
            name = _json_field(sample, self.settings.label_field)
        else:
            name = sample.folder_class if self.settings.labels in ("auto", "folders") else None
        return None if name is None else text(name)

    def reject(self, key: str, reason: str, size: int) -> None:
        self.counts[reason] += 1
        self.rejected.add({"key": text(key), "reason": reason, "bytes": size})


def text(name: str) -> str:
    """A name that can be stored: what is no text in it is spelled out."""
    return name.encode(errors="backslashreplace").decode()


def _place(member: Member) -> dict[str, Any]:
    return {"name": text(member.name), "offset": member.offset, "size": member.size}


def _label(sample: Sample) -> int | None:
    text = sample.text("cls")
    text = text.strip() if text is not None else ""
    return int(text) if text.isdecimal() and len(text) <= 18 else None


def _json_field(sample: Sample, name: str) -> str | None:
    text = sample.text("json")
    try:
        content = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    value = content.get(name) if isinstance(content, dict) else None
    return None if value is None else str(value)
