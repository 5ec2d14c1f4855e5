"""Reading one unit of a source: every sample checked, hashed and noted, or turned away with the reason."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation.config import IngestSettings
from curation.ingest.samples import Member, Sample, stem_of
from curation.ingest.sources import BrokenShardError, Unit
from infra.corpus.corpus import INDEX_SCHEMA, REJECTED_SCHEMA
from infra.corpus.names import escape_name, is_storable
from infra.corpus.writer import ParquetWriter
from infra.hashing import hash_json
from infra.storage.atomic import prune_older_than
from pretrain.data.decode import ImageRejected, decode_rgb, open_image, upright_size
from pretrain.data.sample_depth import DepthSettings

VERSION = 2
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
    first_unclassed: str | None = None
    """Path of the first one"""
    unlabeled: int = 0
    """Images whose .cls file is missing or holds no label"""
    rejected: dict[str, int] = field(default_factory=dict)
    """Files by the reason why they are left out"""
    examples: dict[str, str] = field(default_factory=dict)
    """Path of the first file of each reason"""


class Scans:
    """Units that were read, kept on disk, each in a folder that appears when it is whole.

    A unit is known by its files' names, places, sizes and stamps and by the settings, so that nothing is read twice;
    what has no stamp is known by the run alone. What was not used for a month is forgotten.
    """

    def __init__(self, directory: Path, settings: IngestSettings, run: str) -> None:
        self.directory, self.settings, self.run = directory, settings, run
        directory.mkdir(parents=True, exist_ok=True)
        prune_older_than(directory)

    def _folder(self, unit: Unit) -> Path:
        files = [(file.name, file.url, file.bytes, file.stamp or self.run) for file in unit.files]
        decisive = self.settings.model_dump(mode="json", exclude={"shard_mb"})
        return self.directory / hash_json([VERSION, decisive, unit.name, unit.classes, unit.annotation_suffixes, files])

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
    rows, rejected = (
        ParquetWriter(directory / _ROWS, PART_SCHEMA),
        ParquetWriter(directory / _REJECTED, REJECTED_SCHEMA),
    )
    digest = hashlib.sha256()
    intake = Intake(settings, unit, rejected)
    classes: set[str] = set()
    facts = Facts("")
    try:
        for ordinal, sample in enumerate(unit.samples(settings.max_file_mb << 20, digest)):
            row = intake.accept(sample)
            if row is not None:
                rows.add(row | {"ordinal": ordinal})
                facts.images, facts.bytes = facts.images + 1, facts.bytes + row["image"]["size"]
                facts.unlabeled += row["label"] is None
                if row["class"] is None:
                    facts.unclassed += 1
                    facts.first_unclassed = facts.first_unclassed or unit.path_of(row["image"]["name"])
                classes |= {row["class"]} - {None}
            advance()
    except BrokenShardError as error:
        intake.reject(unit.name, error.reason, unit.total_bytes)
    rows.close()
    rejected.close()
    facts.sha256, facts.classes = digest.hexdigest(), sorted(classes)
    facts.rejected, facts.examples = dict(sorted(intake.counts.items())), intake.examples
    return facts


@dataclass
class Intake:
    """Checks samples one by one. Every file of a sample is in a row of the index, or is rejected with a reason."""

    settings: IngestSettings
    unit: Unit
    rejected: ParquetWriter
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    _keys: set[int] = field(default_factory=set)

    def accept(self, sample: Sample) -> dict[str, Any] | None:
        """The part's columns of a usable sample, or None, with the reason noted."""
        image = sample.image()
        key_hash = int.from_bytes(hashlib.blake2b(sample.key.encode("utf-8", "replace"), digest_size=8).digest(), "big")
        reason, size = ("no_image", None) if image is None else self._check(sample.key, key_hash, image)
        if image is None or image.data is None or size is None:
            self._reject_sample(sample, image, reason)
            return None
        self._keys.add(key_hash)
        others = [each for each in sample.members if each is not image and self._accept_member(each)]
        label, caption = _label(sample), sample.text("txt")
        self._note_unreadable_text(others, label, caption)
        return {
            "key": sample.key,
            "key_hash": key_hash,
            "image": _place(image),
            "members": [_place(each) for each in others],
            "width": size[0],
            "height": size[1],
            "sha256": hashlib.sha256(image.data).hexdigest(),
            "label": label,
            "class": self._class(sample),
            "caption": caption,
        }

    def _check(self, key: str, key_hash: int, image: Member) -> tuple[str, tuple[int, int] | None]:
        """Width and height, or the reason why the image cannot be used."""
        if key_hash in self._keys:
            return "duplicate_key", None
        if not is_storable(f"{key}.{image.extension}"):
            return "unsafe_key", None
        if image.data is None:
            return image.unreadable or "too_many_bytes", None
        try:
            size = self._size(image.data)
        except ImageRejected as error:
            return error.reason, None
        return ("too_small", None) if min(size) < self.settings.min_side else ("", size)

    def _size(self, data: bytes) -> tuple[int, int]:
        if self.settings.check == "header":
            return upright_size(open_image(data, self.settings.max_pixels))
        depth = DepthSettings(bit_depth=self.settings.bit_depth, window=self.settings.window)
        return decode_rgb(data, self.settings.max_pixels, depth).size

    def _accept_member(self, member: Member) -> bool:
        """Whether a sidecar or an annotation can be stored beside its image."""
        reason = None if is_storable(member.extension) else "unsafe_key"
        if member.data is None:
            reason = member.unreadable or "too_many_bytes"
        if reason is not None:
            self.reject(member.name, reason, member.size)
        return reason is None

    def _note_unreadable_text(self, members: Sequence[Member], label: int | None, caption: str | None) -> None:
        """Note captions and labels that are left out although their files are stored."""
        for each in members:
            if each.extension.lower() == "txt" and caption is None:
                self.reject(each.name, "caption_not_utf8", each.size)
            if each.extension.lower() == "cls" and label is None:
                self.reject(each.name, "label_not_a_number", each.size)

    def _reject_sample(self, sample: Sample, image: Member | None, reason: str) -> None:
        for each in sample.members:
            if image is None or each is image:
                self.reject(each.name, each.unreadable or reason, each.size, sample.key)
            else:
                self.reject(each.name, each.unreadable or "image_rejected", each.size, sample.key)

    def _class(self, sample: Sample) -> str | None:
        if self.settings.labels == "json":
            name = _json_field(sample, self.settings.label_field)
        else:
            name = sample.folder_class if self.settings.labels in ("auto", "folders") else None
        return None if name is None else unicodedata.normalize("NFC", escape_name(name))

    def reject(self, name: str, reason: str, size: int, key: str = "") -> None:
        """Note that a file is left out."""
        path = escape_name(self.unit.path_of(name) if name != self.unit.name else name)
        self.counts[reason] += 1
        self.examples.setdefault(reason, path)
        self.rejected.add({"key": escape_name(key or stem_of(name)), "path": path, "reason": reason, "bytes": size})


def _place(member: Member) -> dict[str, Any]:
    return {"name": escape_name(member.name), "offset": member.offset, "size": member.size}


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
