"""Ingest: raw images to a corpus. Every file is either in the index or listed with the reason why not."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.config import IngestConfig, IngestSettings
from curation.ingest.samples import Sample, stem_of
from curation.ingest.scan import PART_SCHEMA, Facts, Scans
from curation.ingest.sources import BrokenShardError, Source, Unit, find_units, is_shard_name
from curation.ingest.tar_reader import SUFFIXES
from infra.artifacts.artifact import Artifact, ArtifactSpec, cache_directory, find_existing, get_or_create
from infra.artifacts.manifest import ArtifactRef
from infra.corpus.corpus import DECODING, INDEX_SCHEMA, Corpus, Shard
from infra.corpus.names import escape_name
from infra.corpus.writer import IndexWriter, ParquetWriter, ShardWriter, shard_path
from infra.errors import UserError
from infra.hashing import hash_json
from infra.progress import progress
from infra.storage import filesystem

VERSION = 3
_PLACED = "placed"  # folder of a copying ingest's finished shards' rows, removed at the end
_ALONE = 8 << 20  # bytes below which starting processes takes longer than reading


def ingest(config: IngestConfig) -> Artifact:
    """Index a folder or shards; return the corpus artifact.

    Units (shards, or runs of loose files) are read in parallel and kept, so that an interrupted ingest goes on, and one
    over a grown source reads only what is new.

    Raises:
        UserError: the source is missing, or holds no usable image.
    """
    work = _work(config)
    facts = work.read()
    spec, resume_from = _spec(config, work, facts), [f"{_PLACED}/*.json"]
    artifact = get_or_create(
        spec, config.out, lambda directory: work.write(directory, facts), resume_from, config.restart
    )
    work.scans.forget_unstamped(work.units)
    _check_places(artifact, work.units)
    return artifact


def find_ingested(config: IngestConfig) -> Artifact | None:
    """The corpus of a source, if all of it was read before and the corpus has been made.

    Raises:
        UserError: the source is missing, or the corpus's place holds another artifact.
    """
    work = _work(config)
    facts = work.known()
    if len(facts) < len(work.units):
        return None
    artifact = find_existing(_spec(config, work, facts), config.out)
    if artifact is not None:
        _check_places(artifact, work.units)
    return artifact


def _work(config: IngestConfig) -> IngestWork:
    source = find_units(config.source, config.shard_mb << 20, config.annotation_suffixes)
    scans = Scans(cache_directory() / "ingest", _settings(config), uuid.uuid4().hex)
    return IngestWork(config.source, source, scans, config.workers or _cores())


def _settings(config: IngestConfig) -> IngestSettings:
    return IngestSettings(**{name: getattr(config, name) for name in IngestSettings.model_fields})


def _spec(config: IngestConfig, work: IngestWork, facts: Mapping[str, Facts]) -> ArtifactSpec:
    inputs = {"source": ArtifactRef(id=work.identity(facts), url=config.source)}
    return ArtifactSpec("corpus", "ingest", VERSION, _settings(config).model_dump(mode="json"), inputs)


def describe_problems(corpus: Artifact) -> list[str]:
    """What a user should know of an ingested corpus, a line each: what was left out, and images without a class."""
    made = corpus.metrics
    lines = [f"rejected: {count} {reason} (rejected.parquet lists them)" for reason, count in made["rejected"].items()]
    if without := made.get("without_class"):
        first = f" ({made['first_without_class']})" if made["first_without_class"] else ""
        has = "image has" if made["images"] == 1 else f"images {'has' if without == 1 else 'have'}"
        lines.append(f"classes: {without} of {made['images']} {has} no class{first}")
    return lines


def _check_places(artifact: Artifact, units: Sequence[Unit]) -> None:
    """Check that the shards of an index that was made earlier are still where it says.

    Raises:
        UserError: they were moved.
    """
    places = {unit.name: _make_absolute(unit.files[0].url) for unit in units if unit.in_place}
    for shard in Corpus.open(artifact.url).shards:
        if filesystem.is_local(shard.url) and Path(shard.url).is_absolute() and not Path(shard.url).exists():
            where = next(iter(places.values()), "elsewhere")
            raise UserError(f"{artifact.url}: says {shard.url}, now {where}; remove it and ingest again")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class IngestWork:
    """One ingest: its units, and what was read of them before."""

    url: str
    source: Source
    scans: Scans
    workers: int

    @property
    def units(self) -> list[Unit]:
        return self.source.units

    def identity(self, facts: Mapping[str, Facts]) -> str:
        """A hash of names and contents, wherever they lie."""
        units = [[unit.name, facts[unit.name].sha256] for unit in self.units]
        return hash_json([units, [[escape_name(path), *more] for path, *more in self.source.rejected]])

    def known(self) -> dict[str, Facts]:
        """The facts of the units that were read before, by name."""
        return {unit.name: facts for unit in self.units if (facts := self.scans.facts(unit)) is not None}

    def read(self) -> dict[str, Facts]:
        """Read the units that were not read before; return the facts of all, by name."""
        found = self.known()
        units = [unit for unit in self.units if unit.name not in found]
        if not units:
            return found
        with progress("ingest", None, done=sum(facts.images for facts in found.values())) as advance:
            if self._runs_alone(units):
                return found | {unit.name: self.scans.scan(unit, advance) for unit in units}
            with _processes(min(self.workers, len(units))) as pool:
                for unit, facts in zip(units, pool.map(self.scans.scan, units), strict=True):
                    found[unit.name] = facts
                    advance(facts.images)
        return found

    def _runs_alone(self, units: Sequence[Unit]) -> bool:
        return min(self.workers, len(units)) < 2 or sum(unit.total_bytes for unit in units) < _ALONE

    def write(self, directory: Path, facts: Mapping[str, Facts]) -> Mapping[str, Any]:
        """Write index and, where samples cannot be read where they are, shards."""
        images, rejected = sum(each.images for each in facts.values()), self._rejected(facts)
        if not images:
            raise UserError(f"{self.url}: no usable image among {sum(rejected.values())} files: {self._reasons(facts)}")
        labels = Labels.from_facts(self.scans.settings, list(facts.values()))
        used = [unit for unit in self.units if facts[unit.name].images]
        prefixes = self._prefixes(used)
        index = IndexWriter(directory)
        shards: list[Shard] = []
        for unit, (shard, path) in zip(used, self._placed(directory, used, facts, prefixes), strict=True):
            for batch in pq.ParquetFile(path).iter_batches():
                index.add_table(_index_rows(pa.Table.from_batches([batch]), len(shards), prefixes[unit.name], labels))
            shards.append(shard)
        for row in self._rejected_rows():
            index.reject(row)
        index.finish(shards)
        self._write_decoding(directory)
        shutil.rmtree(directory / _PLACED, ignore_errors=True)
        return {
            "images": images,
            "rejected": rejected,
            "classes": labels.names,
            "without_class": labels.without,
            "first_without_class": labels.first_without,
            "bytes": sum(each.bytes for each in facts.values()),
        }

    def _write_decoding(self, directory: Path) -> None:
        """What readers of the corpus need to know of its images."""
        settings = self.scans.settings
        depth = {"bit_depth": settings.bit_depth, "window": settings.window}
        (directory / DECODING).write_text(json.dumps({"decoded": settings.check == "pixels", **depth}))

    def _rejected(self, facts: Mapping[str, Facts]) -> dict[str, int]:
        """Files that are left out, by reason."""
        total = Counter(reason for _, reason, _ in self.source.rejected)
        for each in facts.values():
            total.update(each.rejected)
        return dict(sorted(total.items()))

    def _rejected_rows(self) -> Iterator[dict[str, Any]]:
        for path, reason, size in self.source.rejected:
            yield {"key": escape_name(stem_of(path)), "path": escape_name(path), "reason": reason, "bytes": size}
        for unit in self.units:
            yield from pq.read_table(self.scans.rejected(unit)).to_pylist()

    def _reasons(self, facts: Mapping[str, Facts]) -> str:
        """Reasons with their counts and the first file of each."""
        examples: dict[str, str] = {}
        for path, reason, _ in self.source.rejected:
            examples.setdefault(reason, escape_name(path))
        for unit in self.units:
            examples = facts[unit.name].examples | examples
        return ", ".join(f"{reason} {count} ({examples[reason]})" for reason, count in self._rejected(facts).items())

    def _prefixes(self, units: list[Unit]) -> dict[str, str]:
        """What stands before the keys of each unit: its name, where two shards use the same key; else nothing."""
        hashes = [pq.read_table(self.scans.rows(unit), columns=["key_hash"])["key_hash"] for unit in units]
        joined = np.sort(np.concatenate([each.to_numpy() for each in hashes]))
        if not (joined[1:] == joined[:-1]).any():
            return dict.fromkeys([unit.name for unit in units], "")
        stems = {unit.name: _stem(unit.name) for unit in units}
        taken = set(stems.values())
        nested = any(str(parent) in taken for stem in taken for parent in PurePosixPath(stem).parents)
        if nested or len(set(stems.values())) < len(stems):
            stems = {name: name for name in stems}
        return {name: f"{escape_name(stem)}/" for name, stem in stems.items()}

    def _placed(
        self, directory: Path, units: list[Unit], facts: Mapping[str, Facts], prefixes: Mapping[str, str]
    ) -> Iterator[tuple[Shard, Path]]:
        """The shard of each unit and the file of its rows."""
        if all(unit.in_place for unit in units):
            for unit in units:
                yield (
                    Shard(_make_absolute(unit.files[0].url), unit.total_bytes, facts[unit.name].sha256),
                    self.scans.rows(unit),
                )
            return
        most = self.scans.settings.max_file_mb << 20
        copies = [
            ShardCopy(unit, directory, number, self.scans.rows(unit), prefixes[unit.name], most)
            for number, unit in enumerate(units)
        ]
        with progress("copy", sum(facts[unit.name].images for unit in units)) as advance:
            for unit, result in zip(units, self._run(copies), strict=True):
                advance(facts[unit.name].images)
                yield result

    def _run(self, copies: list[ShardCopy]) -> Iterator[tuple[Shard, Path]]:
        if self._runs_alone([copy.unit for copy in copies]):
            yield from map(ShardCopy.run, copies)
        else:
            with _processes(min(self.workers, len(copies))) as pool:
                yield from pool.map(ShardCopy.run, copies)


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """New processes, not forks: the caller may run threads."""
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise UserError(
                "ingest: a worker process died, of memory perhaps; a script needs `if __name__ == '__main__':` around "
                "its call; --workers 1 does without processes"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _stem(name: str) -> str:
    """A shard's name without its suffix."""
    if not is_shard_name(name):
        return name
    return name[: -len(next(each for each in SUFFIXES if name.lower().endswith(each)))]


@dataclass(frozen=True)
class Labels:
    """How the samples' classes become numbers."""

    names: list[str]
    """Classes in the order of their numbers; none: the numbers that .cls members give"""
    given: bool
    """Whether .cls members count"""
    without: int = 0
    """Images without a class beside others that have one"""
    first_without: str | None = None
    """Path of the first of them"""

    @classmethod
    def from_facts(cls, settings: IngestSettings, facts: Sequence[Facts]) -> Labels:
        """By the settings, and by which images have a class.

        Raises:
            UserError: classes were asked for, and some image has none.
        """
        if settings.labels == "none":
            return cls([], given=False)
        without, images = sum(each.unclassed for each in facts), sum(each.images for each in facts)
        first = next((each.first_unclassed for each in facts if each.first_unclassed), None)
        if without and settings.labels in ("folders", "json"):
            raise UserError(
                f"labels: {settings.labels}, but {without} of {images} images have no class, such as {first}; move or "
                "remove them, or use --labels auto"
            )
        unlabeled = sum(each.unlabeled for each in facts)
        if without and unlabeled < images:
            return cls([], given=True, without=unlabeled)
        names = sorted({name for each in facts for name in each.classes})
        return cls(names, given=True, without=without if names else 0, first_without=first if names else None)

    def numbers(self, rows: pa.Table) -> pa.Array:
        if self.names:
            return pc.index_in(rows["class"], pa.array(self.names, pa.string())).cast(pa.int64())
        return rows["label"] if self.given else pa.nulls(len(rows), pa.int64())


def _index_rows(rows: pa.Table, shard: int, prefix: str, labels: Labels) -> pa.Table:
    """Rows of a part as rows of the index."""
    columns = {name: rows[name] for name in INDEX_SCHEMA.names if name != "shard"}
    columns["key"] = pc.binary_join_element_wise(prefix, rows["key"], "")
    columns["shard"] = pa.array(np.full(len(rows), shard), pa.int32())
    columns["label"] = labels.numbers(rows)
    return pa.table({name: columns[name] for name in INDEX_SCHEMA.names})


def _make_absolute(url: str) -> str:
    if "://" in url:
        return url.removeprefix("file://")
    return str(filesystem.local_path(url).resolve())


@dataclass(frozen=True)
class ShardCopy:
    """Writing one unit's accepted samples into a shard of the corpus's own."""

    unit: Unit
    directory: Path
    number: int
    rows: Path
    prefix: str
    most: int
    """Bytes of the largest file that is copied"""

    def run(self) -> tuple[Shard, Path]:
        """Write the shard and the rows with its places, unless an earlier attempt has."""
        placed = self.directory / _PLACED / f"{self.number:06d}.parquet"
        facts = placed.with_suffix(".json")
        if facts.exists():
            return Shard(**json.loads(facts.read_text())), placed
        placed.parent.mkdir(exist_ok=True)
        writer = ShardWriter(shard_path(self.directory, self.number))
        rows = ParquetWriter(placed, PART_SCHEMA)
        for row, sample in self._accepted():
            rows.add(row | self._place(writer, row, sample))
        rows.close()
        shard = writer.finish(self.directory)
        partial = facts.with_suffix(".part")
        partial.write_text(json.dumps(vars(shard)))
        partial.rename(facts)
        return shard, placed

    def _accepted(self) -> Iterator[tuple[dict[str, Any], Sample]]:
        """Accepted rows with their samples, read again from the source."""
        wanted = {row["ordinal"]: row for row in pq.read_table(self.rows).to_pylist()}
        try:
            for ordinal, sample in enumerate(self.unit.samples(self.most, hashlib.sha256())):
                if ordinal in wanted:
                    yield wanted.pop(ordinal), sample
        except BrokenShardError:
            pass  # as when it was scanned
        if wanted:
            raise UserError(f"{self.unit.files[0].url}: changed while it was read; ingest again")

    def _place(self, writer: ShardWriter, row: Mapping[str, Any], sample: Sample) -> dict[str, Any]:
        image = sample.image()
        members = {each.extension: each.data for each in sample.members if each.data is not None}
        if image is None or hashlib.sha256(image.data or b"").hexdigest() != row["sha256"]:
            raise UserError(f"{self.unit.files[0].url}: changed while it was read; ingest again")
        places = writer.add(self.prefix + row["key"], members)
        return {"image": places.pop(image.extension), "members": list(places.values())}
