"""Sources as they are met: odd names, links, moved and changed files, interrupted and simultaneous ingests."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from curation.ingest.ingest import ShardCopy
from curation.ingest.scan import Scans
from infra.corpus.corpus import Corpus
from infra.corpus.writer import ShardWriter
from infra.errors import UserError
from tests.conftest import encode_image, image_folder, ingest_folder, picture
from tests.test_curation_ingest import rejected, shards, tar


def test_only_what_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shards(tmp_path / "source", 3)
    read: list[str] = []
    scan = Scans.scan
    monkeypatch.setattr(Scans, "scan", lambda self, unit, *more: (read.append(unit.name), scan(self, unit, *more))[1])
    first = ingest_folder(source, tmp_path / "{id}")
    ingest_folder(source, tmp_path / "{id}")
    assert read == ["000.tar", "001.tar", "002.tar"]
    tar(source / "001.tar", {"new.png": encode_image(picture(99))})
    second = ingest_folder(source, tmp_path / "{id}")
    tar(source / "003.tar", {"more.png": encode_image(picture(98))})
    third = ingest_folder(source, tmp_path / "{id}")
    assert read[3:] == ["001.tar", "003.tar"]
    assert len({each.artifact.id for each in (first, second, third)}) == 3
    assert second.keys == [*first.keys[:5], "new", *first.keys[10:]]
    assert third.keys == [*second.keys, "more"]


def test_a_shard_behind_a_link_is_known_by_what_it_leads_to(tmp_path: Path) -> None:
    """Tars are padded, so that another one may have the same size."""
    target = tar(tmp_path / "target", {"old.png": encode_image(picture(1))})
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").symlink_to(target)
    assert ingest_folder(tmp_path / "shards", tmp_path / "{id}").keys == ["old"]
    size = target.stat().st_size
    tar(target, {"new.png": encode_image(picture(2))})
    assert target.stat().st_size == size
    assert ingest_folder(tmp_path / "shards", tmp_path / "{id}").keys == ["new"]


def test_links_pipes_and_odd_names_in_a_folder(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 2)
    image_folder(tmp_path / "elsewhere", 1, first=5)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "linked" / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe.png")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(encode_image(picture(7)))
    (folder / "x.tar").mkdir()
    (folder / "x.tar" / "in.png").write_bytes(encode_image(picture(8)))
    corpus = ingest_folder(folder, tmp_path / "corpus")
    assert corpus.keys == ["0000", "0001", "linked/0005", "x.tar/in"]
    assert rejected(corpus) == {"gone.png": "broken_link", "pipe.png": "special_file", r"caf\udce9.png": "unsafe_key"}


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["train.000.tar", "train.001.tar"], ["train.000/a", "train.001/a"]),
        (["v1.0/000.tar", "v1.1/000.tar"], ["v1.0/000/a", "v1.1/000/a"]),
        (["000.tar", "000.tar.gz"], ["000.tar/a", "000.tar.gz/a"]),
        (["s.tar", "s/t.tar"], ["s.tar/a", "s/t.tar/a"]),
    ],
)
def test_names_before_keys_are_never_the_same(tmp_path: Path, names: list[str], keys: list[str]) -> None:
    for name in names:
        (tmp_path / "shards" / name).parent.mkdir(parents=True, exist_ok=True)
        tar(tmp_path / "shards" / name, {"a.png": encode_image(picture(1))})
    assert ingest_folder(tmp_path / "shards", tmp_path / "corpus").keys == keys


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_odd_members_are_listed_or_copied_whole(tmp_path: Path, suffix: str) -> None:
    first, second, lone = (encode_image(picture(i)) for i in range(3))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in (("a.png", first), ("a.png", second), ("b._png", lone), ("b._meta", b"1234"), ("c.", b"x")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    content = buffer.getvalue()
    (tmp_path / f"x{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    corpus = ingest_folder(tmp_path / f"x{suffix}", tmp_path / "corpus")
    assert corpus.keys == ["a", "b"]
    assert rejected(corpus) == {f"x{suffix}/a.png": "duplicate_key", f"x{suffix}/c.": "not_an_image"}
    assert corpus.read_images([0, 1]) == [first, lone]
    (meta,) = corpus.index_row(1)["members"]
    assert corpus.read_range(0, meta["offset"], meta["size"]) == b"1234"


def test_large_sidecars_are_left_behind(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar.gz", {"a.png": encode_image(picture(1)), "a.json": b" " * (2 << 20)})
    corpus = ingest_folder(tmp_path / "x.tar.gz", tmp_path / "corpus", max_file_mb=1)
    assert rejected(corpus) == {"x.tar.gz/a.json": "too_many_bytes"}
    assert corpus.index_row(0)["members"] == []
    assert corpus.shards[0].bytes < 1 << 20


def test_folders_of_img2dataset_are_no_classes(tmp_path: Path) -> None:
    for part in ("00000", "00001"):
        folder = image_folder(tmp_path / "files" / part, 2, first=int(part) * 10)
        (folder.parent / f"{part}_stats.json").write_text("{}")
        (folder.parent / f"{part}.parquet").write_bytes(b"PAR1")
    corpus = ingest_folder(tmp_path / "files", tmp_path / "corpus")
    assert corpus.classes == []
    assert corpus.table["label"].null_count == len(corpus) == 4
    assert set(rejected(corpus).values()) == {"img2dataset_record"}


def test_leftovers_of_another_source_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    """As after a kill while shards are copied, with another source at the same place the next time."""
    source = shards(tmp_path / "source", 3, ".tar.gz")
    copy = ShardCopy.run

    def stop(self: ShardCopy) -> object:
        if self.number == 2:
            raise InterruptedError
        return copy(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardCopy, "run", stop)
        with pytest.raises(InterruptedError):
            ingest_folder(source, tmp_path / "corpus")
    assert len(list((tmp_path / "corpus" / "shards").iterdir())) == 2
    for path in source.iterdir():
        path.unlink()
    tar(source / "new.tar.gz", {"new.png": encode_image(picture(1))})
    with pytest.raises(UserError, match=r"unfinished work of other settings \(another source\)"):
        ingest_folder(source, tmp_path / "corpus")
    corpus = ingest_folder(source, tmp_path / "corpus", restart=True)
    assert corpus.keys == ["new"]
    assert [file.path for file in corpus.artifact.manifest.files if file.path.endswith(".tar")] == ["shards/000000.tar"]


def test_moved_shards_are_reported(tmp_path: Path) -> None:
    source = shards(tmp_path / "source", 2)
    ingest_folder(source, tmp_path / "{id}")
    source.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"says .*source/000\.tar, now .*moved/000\.tar; remove it and ingest again"):
        ingest_folder(tmp_path / "moved", tmp_path / "{id}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/{{000..", "has a brace without its partner"),
        ("{tmp}/" + "x" * 300, "too long"),
        ("https://user:s3cr3t@example.org/x.tar", "holds a credential"),
        ("https://example.org/x.tar?X-Amz-Signature=s3cr3t", "holds a credential"),
    ],
)
def test_a_source_that_cannot_be_is_one_line(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ingest_folder(source.format(tmp=tmp_path), tmp_path / "corpus")  # type: ignore[arg-type]
    assert "s3cr3t" not in str(caught.value)


_INGEST = """
from curation.config import IngestConfig
from curation.ingest.ingest import ingest
if __name__ == "__main__":
    ingest(IngestConfig(source={source!r}, out={out!r}, workers=1))
"""


@pytest.mark.multiprocess
def test_a_source_can_be_ingested_twice_at_once(tmp_path: Path) -> None:
    source = shards(tmp_path / "source", 30)
    runs = [
        subprocess.Popen([sys.executable, "-c", _INGEST.format(source=str(source), out=str(tmp_path / f"out{number}"))])
        for number in range(3)
    ]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    files = [Corpus.open(str(tmp_path / f"out{number}")).artifact.manifest.files for number in range(3)]
    assert files[0] == files[1] == files[2]


@pytest.mark.multiprocess
def test_a_killed_ingest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shards(tmp_path / "source", 30, ".tar.gz")
    whole = ingest_folder(source, tmp_path / "whole")
    cache, out = tmp_path / "cache", tmp_path / "killed"
    code, environment = _INGEST.format(source=str(source), out=str(out)), os.environ | {"FOVEA_CACHE": str(cache)}
    _kill_when(lambda: len(list(cache.glob("ingest/*/facts.json"))) > 3, code, environment)
    scanned = len(list(cache.glob("ingest/*/facts.json")))
    _kill_when(lambda: len(list(out.glob("placed/*.json"))) > 3, code, environment)
    copied = len(list(out.glob("placed/*.json")))
    assert 3 < scanned < 30
    assert 3 < copied < 30
    monkeypatch.setenv("FOVEA_CACHE", str(cache))
    monkeypatch.setattr(Scans, "scan", lambda self, unit, *more: pytest.fail("read again"))
    done: list[str] = []
    opened = ShardWriter.__init__
    monkeypatch.setattr(ShardWriter, "__init__", lambda self, path: (done.append(path.name), opened(self, path))[1])
    assert ingest_folder(source, out, workers=1).artifact.manifest.files == whole.artifact.manifest.files
    assert len(done) == 30 - copied


def _kill_when(reached: Callable[[], bool], code: str, environment: dict[str, str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    while not reached():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
