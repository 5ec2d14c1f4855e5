"""Corpora: every sample one ranged read away, shards that others can read."""

from __future__ import annotations

from pathlib import Path

import pytest
import webdataset as wds

from infra.corpus.corpus import Corpus
from infra.corpus.writer import CorpusWriter
from infra.errors import UserError
from tests.conftest import encode_image, image_folder, ingest_folder, picture

ROW = {"width": 40, "height": 32, "sha256": "0", "label": 3, "caption": "blobs"}


def samples(count: int) -> list[tuple[str, dict[str, bytes]]]:
    return [(f"s{i:03d}", {"png": encode_image(picture(i)), "json": b"{}", "txt": b"x" * i}) for i in range(count)]


def write(directory: Path, count: int, shard_bytes: int = 20_000) -> None:
    directory.mkdir()
    writer = CorpusWriter(directory, shard_bytes)
    for key, members in samples(count):
        writer.add(key, members, "png", ROW)
    writer.finish()


def test_equal_samples_make_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", 30)
    write(tmp_path / "b", 30)
    first = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*.*")}
    second = {path.relative_to(tmp_path / "b"): path.read_bytes() for path in (tmp_path / "b").rglob("*.*")}
    assert first == second
    assert sum(path.suffix == ".tar" for path in first) > 1


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    write(tmp_path / "a", 10)
    shards = sorted(str(path) for path in (tmp_path / "a" / "shards").iterdir())
    read = {
        sample["__key__"]: {name: data for name, data in sample.items() if not name.startswith("__")}
        for sample in wds.WebDataset(shards, shardshuffle=False)
    }
    assert read == dict(samples(10))


def test_every_image_is_where_the_index_says(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "images", 40)
    corpus = ingest_folder(source, tmp_path / "corpus")
    assert len(corpus) == 40
    for row, key in enumerate(corpus.keys):
        assert corpus.read_image(row) == (source / f"{key}.png").read_bytes()


def test_a_copied_sample_keeps_every_member(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "images", 3)
    for path in list(source.iterdir()):
        path.with_suffix(".txt").write_text(f"caption of {path.stem}")
        path.with_suffix(".json").write_text('{"license": "CC0"}')
    corpus = ingest_folder(source, tmp_path / "corpus")
    (tmp_path / "copy").mkdir()
    writer = CorpusWriter(tmp_path / "copy", 1 << 20)
    writer.copy(corpus, 1)
    writer.finish()
    sample = next(iter(wds.WebDataset([str(tmp_path / "copy/shards/000000.tar")], shardshuffle=False)))
    assert sample["__key__"] == "0001"
    assert sample["txt"] == b"caption of 0001"
    assert sample["json"] == b'{"license": "CC0"}'
    assert sample["png"] == corpus.read_image(1)


def test_a_shard_that_shrank_is_noticed(tmp_path: Path) -> None:
    corpus = ingest_folder(image_folder(tmp_path / "images", 5), tmp_path / "corpus")
    shard = Path(corpus.shard_url(0))
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(UserError, match="sample 0004 changed after ingest"):
        Corpus.open(corpus.artifact.url).read_image(4)
