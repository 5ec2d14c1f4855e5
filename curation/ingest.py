"""Ingest: raw images to a corpus. Every file is either in the index or listed with the reason why not."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from curation.config import IngestConfig, IngestSettings
from curation.sources import BrokenShard, Sample, Source, fingerprint, open_source
from infra.artifacts import Artifact, Plan, produce
from infra.corpora import CorpusWriter, Shard, write_index
from infra.errors import UserError
from infra.progress import progress
from pretrain.data.decode import ImageRejected, decode_rgb

VERSION = 1


def ingest(config: IngestConfig) -> Artifact:
    """Index a folder or shards; return the corpus artifact.

    Raises:
        UserError: the source is missing, or holds no usable image.
    """
    source = open_source(config.source)
    settings = config.model_dump(mode="json", exclude={"source", "out"})
    inputs = {"source": fingerprint(source, config.source)}
    plan = Plan("corpus", "ingest", VERSION, settings, inputs)
    return produce(plan, config.out, lambda directory: _write(source, config, directory))


def _write(source: Source, config: IngestConfig, directory: Path) -> Mapping[str, Any]:
    intake = Intake(config)
    sink = _InPlace(source) if source.in_place else _Copy(CorpusWriter(directory, config.shard_mb << 20))
    with progress("ingest", None) as advance:
        for sample in source.samples():
            if isinstance(sample, BrokenShard):
                intake.reject(sample.shard.name, "broken_shard", sample.shard.bytes)
                continue
            row = intake.accept(sample)
            if row is not None:
                sink.add(sample, row)
            advance()
    if not sink.rows:
        raise UserError(f"{config.source}: no usable image among {intake.seen}; reasons: {intake.summary()}")
    classes = _assign_labels(sink.rows, intake)
    sink.finish(directory, intake.rejected)
    return {
        "images": len(sink.rows),
        "rejected": dict(sorted(Counter(each["reason"] for each in intake.rejected).items())),
        "classes": classes,
        "bytes": sum(row["image"]["size"] for row in sink.rows),
    }


@dataclass
class Intake:
    """Checks samples one by one and keeps the list of those it turned away."""

    settings: IngestSettings
    seen: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)
    class_names: list[str | None] = field(default_factory=list)
    _keys: set[str] = field(default_factory=set)

    def accept(self, sample: Sample) -> dict[str, Any] | None:
        """The index columns of a usable sample, or None, with the reason noted."""
        self.seen += 1
        image = sample.image()
        if image is None:
            self.reject(sample.key, "no_image", sum(len(each.data) for each in sample.members))
            return None
        reason, picture = self._look(sample.key, image.data)
        if picture is None:
            self.reject(sample.key, reason, len(image.data))
            return None
        self._keys.add(sample.key)
        self.class_names.append(self._class_name(sample))
        return {
            "width": picture.width,
            "height": picture.height,
            "sha256": hashlib.sha256(image.data).hexdigest(),
            "label": _label(sample),
            "caption": sample.text("txt"),
        }

    def _look(self, key: str, data: bytes) -> tuple[str, Image.Image | None]:
        """The decoded image, or the reason why there is none."""
        if key in self._keys:
            return "duplicate_key", None
        if not key.isprintable():
            return "unprintable_key", None
        try:
            picture = decode_rgb(data, self.settings.max_pixels)
        except ImageRejected as error:
            return error.reason, None
        if min(picture.size) < self.settings.min_side:
            return "too_small", None
        return "", picture

    def _class_name(self, sample: Sample) -> str | None:
        if self.settings.labels == "json":
            return _json_field(sample, self.settings.label_field)
        return sample.folder_class if self.settings.labels in ("auto", "folders") else None

    def reject(self, key: str, reason: str, size: int) -> None:
        key = key.encode(errors="backslashreplace").decode()
        self.rejected.append({"key": key, "reason": reason, "bytes": size})

    def summary(self) -> str:
        return ", ".join(f"{reason} {count}" for reason, count in Counter(r["reason"] for r in self.rejected).items())


def _label(sample: Sample) -> int | None:
    text = sample.text("cls")
    text = text.strip() if text is not None else ""
    return int(text) if text.isdecimal() and len(text) <= 18 else None


def _json_field(sample: Sample, field: str) -> str | None:
    text = sample.text("json")
    try:
        content = json.loads(text) if text is not None else None
    except (ValueError, RecursionError):
        return None
    value = content.get(field) if isinstance(content, dict) else None
    return None if value is None else str(value)


def _assign_labels(rows: list[dict[str, Any]], intake: Intake) -> list[str]:
    """Number the classes in the order of their names; return the names, or none where some image has no class."""
    labels, found = intake.settings.labels, intake.class_names
    if labels == "none":
        for row in rows:
            row["label"] = None
    if None in found:
        if labels in ("folders", "json"):
            without = f"{found.count(None)} of {len(found)} images have no class"
            raise UserError(f"labels: {labels}, but {without}; mend them, or choose auto")
        return []
    names = sorted({name for name in found if name is not None})
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    for row, name in zip(rows, found, strict=True):
        row["label"] = numbers[name]
    return names


class _Copy:
    """Writes samples into the corpus's own shards."""

    def __init__(self, writer: CorpusWriter) -> None:
        self.writer = writer

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.writer.rows

    def add(self, sample: Sample, row: dict[str, Any]) -> None:
        image = sample.image()
        assert image is not None
        members = {each.extension: each.data for each in sample.members}
        self.writer.add(sample.key, members, image.extension, row)

    def finish(self, directory: Path, rejected: list[dict[str, Any]]) -> None:
        self.writer.finish(rejected)


class _InPlace:
    """Notes where samples lie in shards that stay where they are."""

    def __init__(self, source: Source) -> None:
        self.shards = [Shard(_absolute(file.url), file.bytes, file.sha256) for file in source.files]
        self.rows: list[dict[str, Any]] = []

    def add(self, sample: Sample, row: dict[str, Any]) -> None:
        image = sample.image()
        assert image is not None
        places = {
            each.name: {"name": each.name, "offset": each.offset, "size": len(each.data)} for each in sample.members
        }
        row = {"key": sample.key, "shard": sample.shard, "image": places.pop(image.name), **row}
        self.rows.append({**row, "members": list(places.values())})

    def finish(self, directory: Path, rejected: list[dict[str, Any]]) -> None:
        write_index(directory, self.rows, self.shards, rejected)


def _absolute(url: str) -> str:
    if "://" in url:
        return url.removeprefix("file://")
    return str(Path(url).resolve())
