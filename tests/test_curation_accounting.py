"""Everything that is seen is accounted for: rows of the index, their members, and rows of rejected.parquet."""

from __future__ import annotations

import gzip
import io
import tarfile
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.corpus.corpus import REJECTED, Corpus
from infra.corpus.names import escape_name, is_storable
from infra.errors import UserError
from tests.conftest import encode_image, ingest_folder, picture

IMAGES = (encode_image(picture(1, (12, 10)), "JPEG"), encode_image(picture(2, (12, 10), "L")))
CONTENTS = st.sampled_from([*IMAGES, *IMAGES, b"text", b"{}", b"7", b"\xff\xfe"])
STEMS = st.sampled_from(["a", "b", "a.0001", "a.0002", "b.seg", ".c", "A", "d e", "é", "x\n", "_y", "-", "2024.01 z"])
SUFFIXES = st.sampled_from(["", ".jpg", ".JPG", ".png", ".txt", ".json", ".cls", "._jpg", ".bin", ".zip", ".", ".jfif"])
FOLDERS = st.sampled_from(["", "", "cat/", "dog/", ".hidden/", "cat/deep.er/"])
NAMES = st.builds(lambda *parts: "".join(parts), FOLDERS, STEMS, SUFFIXES).filter(
    lambda name: name.rpartition("/")[2] not in ("", ".", "..")
)
ODD_NAMES = st.sampled_from(["../up.jpg", "ok/../d.jpg", "/abs/a.jpg", "./a.jpg", "a//b.jpg", "x\x01.jpg", "a.j\x01"])
KINDS = st.sampled_from([*[tarfile.REGTYPE] * 4, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
ENTRIES = st.lists(st.tuples(NAMES | ODD_NAMES, CONTENTS, KINDS), min_size=1, max_size=14)
BOTH = ("caption_not_utf8", "label_not_a_number")
"""Reasons of files that are stored beside their image all the same."""
SLOW = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)


def unique(content: bytes, number: int) -> bytes:
    """A content that no other file has, and that decodes as before: decoders stop at the image's end."""
    return content + b"\n%06d" % number


def stored(corpus: Corpus) -> Iterator[bytes]:
    """Contents of all files in the index."""
    for row in corpus.table.to_pylist():
        for each in (row["image"], *row["members"]):
            yield corpus.read_range(row["shard"], each["offset"], each["size"])


def left_out(corpus: Corpus) -> list[str]:
    """Paths of the files that are in no row of the index."""
    rows = pq.read_table(corpus.artifact.local_file(REJECTED)).to_pylist()
    return [row["path"] for row in rows if row["reason"] not in BOTH]


@SLOW
@given(st.dictionaries(NAMES, CONTENTS, min_size=1, max_size=12))
def test_every_file_of_a_folder_is_accounted_for(tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = tmp_path / uuid.uuid4().hex
    files = {name: unique(content, number) for number, (name, content) in enumerate(files.items())}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    try:
        corpus = ingest_folder(folder, tmp_path / "{id}")
    except UserError as error:
        assert f"no usable image among {len(files)} files" in str(error)
        return
    by_path = {escape_name(name): data for name, data in files.items()}
    accounted = Counter([*stored(corpus), *(by_path[path] for path in left_out(corpus))])
    assert accounted.keys() == set(files.values())
    images = [corpus.read_image(row) for row in range(len(corpus))]
    assert len(set(images)) == len(images)
    assert all(accounted[image] == 1 for image in images)
    assert all(is_storable(key) and "." not in key.rpartition("/")[2] for key in corpus.keys)
    assert len(set(corpus.keys)) == len(corpus)


@SLOW
@given(ENTRIES, st.sampled_from([".tar", ".tar.gz", ".TAR"]), st.booleans())
def test_every_entry_of_a_shard_is_accounted_for(
    tmp_path: Path, entries: list[tuple[str, bytes, bytes]], suffix: str, is_joined: bool
) -> None:
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    contents = [unique(content, number) for number, (_, content, _) in enumerate(entries)]
    middle = len(entries) // 2 if is_joined else len(entries)
    data = b"".join(
        archive([(*entry, content) for entry, content in zip(entries[part], contents[part], strict=True)])
        for part in (slice(0, middle), slice(middle, None))
    )
    (folder / f"s{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    try:
        corpus = ingest_folder(folder, tmp_path / "{id}")
    except UserError as error:
        assert f"no usable image among {len(entries)} files" in str(error)
        return
    paths = Counter(left_out(corpus))
    expected = Counter(escape_name(f"s{suffix}/{name}") for name, _, _ in entries)
    assert paths <= expected
    kept = set(stored(corpus))
    for (name, _, kind), content in zip(entries, contents, strict=True):
        assert content in kept or paths[escape_name(f"s{suffix}/{name}")]
        assert kind == tarfile.REGTYPE or content not in kept
    assert len(set(corpus.keys)) == len(corpus)
    assert all(is_storable(key) for key in corpus.keys)


def archive(entries: list[tuple[str, bytes, bytes, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, _, kind, content in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "elsewhere"
            entry.size = len(content) if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("count", [3, 40])
def test_images_of_one_dotted_name_are_samples_of_their_own(tmp_path: Path, count: int) -> None:
    """Also where there are more of them than are held at once."""
    entries = [
        (f"clip.{number:04d}.{suffix}", b"", tarfile.REGTYPE, content)
        for number in range(count)
        for suffix, content in (("jpg", unique(IMAGES[0], number)), ("json", b"{}"))
    ]
    (tmp_path / "s.tar").write_bytes(archive(entries))
    corpus = ingest_folder(tmp_path / "s.tar", tmp_path / "corpus")
    assert [key.partition("-")[0] for key in corpus.keys] == [f"clip_{number:04d}" for number in range(count)]
    assert [len(row["members"]) for row in corpus.table.to_pylist()] == [1] * count


def test_masks_beside_images_are_annotations_when_it_is_said(tmp_path: Path) -> None:
    names = ["x.jpg", "x.png", "y.jpg", "y.seg.png"]
    entries = [(name, b"", tarfile.REGTYPE, unique(IMAGES["png" in name], i)) for i, name in enumerate(names)]
    (tmp_path / "s.tar").write_bytes(archive(entries))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, _, _, content in entries:
        (folder / name).write_bytes(content)
    separate = ingest_folder(tmp_path / "s.tar", tmp_path / "separate")
    assert len(separate) == 3
    for source, suffixes in ((tmp_path / "s.tar", ["png"]), (folder, ["png", "seg.png"])):
        corpus = ingest_folder(source, tmp_path / f"{source.stem}-corpus", annotation_suffixes=suffixes)
        assert corpus.keys == ["x", "y"]
        assert [len(row["members"]) for row in corpus.table.to_pylist()] == [1, 1]
        members = [row["members"][0]["name"] for row in corpus.table.to_pylist()]
        assert members == ["x.png", "y.seg.png"]
