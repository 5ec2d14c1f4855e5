"""Tar archives: as tarfile reads them, and never more than is there."""

from __future__ import annotations

import gzip
import io
import tarfile

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.ingest.sources import split_name
from curation.ingest.tar_reader import BrokenTarError, DecompressedStream, TarMember, iterate_members

NAMES = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), min_size=1, max_size=200)


def archive(files: list[tuple[str, bytes]], kind: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def buffered(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]


def read(data: bytes, most: int = 1 << 20) -> list[TarMember]:
    return list(iterate_members(io.BytesIO(data), most))


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=2000)), max_size=5),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_files_are_those_tarfile_finds(files: list[tuple[str, bytes]], kind: int) -> None:
    data = archive(files, kind)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(entry.name.rstrip("/"), entry.offset_data, entry.size) for entry in tar if entry.isfile()]
    found = read(data)
    assert [(each.name.rstrip("/"), each.offset, each.size) for each in found] == expected
    assert all(data[each.offset : each.offset + each.size] == each.data for each in found)


def test_links_and_devices_are_named_and_folders_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            entry = tarfile.TarInfo("a" * 150)
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
        entry = tarfile.TarInfo("file")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"abc"))
    reasons = ["link", "link", "special_file", "special_file"]
    found = read(buffer.getvalue())
    assert [(each.name, each.unreadable, each.data) for each in found] == [
        *(("a" * 150, reason, None) for reason in reasons),
        ("file", None, b"abc"),
    ]


def test_sparse_files_are_named_and_what_follows_is_found() -> None:
    """GNU's old form, with a map that goes on in further blocks, and that of PAX."""
    entry = tarfile.TarInfo("holes")
    entry.type, entry.size = tarfile.GNUTYPE_SPARSE, 700
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
    more = bytearray(512)
    more[504] = 1
    pax = tarfile.TarInfo("GNUSparseFile.0/other")
    pax.pax_headers, pax.size = {"GNU.sparse.major": "1", "GNU.sparse.name": "other"}, 600
    data = bytes(header) + bytes(more) + bytes(512) + bytes(1024)
    data += pax.tobuf(tarfile.PAX_FORMAT) + bytes(1024) + archive([("after", b"abc")], tarfile.GNU_FORMAT)
    found = read(data)
    assert [(each.name, each.unreadable) for each in found] == [
        ("holes", "sparse_file"),
        ("other", "sparse_file"),
        ("after", None),
    ]
    assert data[found[2].offset :][:3] == b"abc"


def test_joined_archives_are_read_to_the_last_end_mark() -> None:
    """As `cat a.tar b.tar` makes them; an archive that is cut short behind the first is broken."""
    first, second = (archive([(name, name.encode() * 300)], tarfile.GNU_FORMAT) for name in ("a", "b"))
    assert [(each.name, (first + second)[each.offset :][:2]) for each in read(first + second)] == [
        ("a", b"aa"),
        ("b", b"bb"),
    ]
    with pytest.raises(BrokenTarError):
        read(first + second[:700])
    with pytest.raises(BrokenTarError):
        read(first + b"no header at all" * 32)


def test_a_large_file_is_named_but_not_held() -> None:
    data = archive([("small", b"1"), ("large", b"2" * 5000), ("after", b"3")], tarfile.GNU_FORMAT)
    assert [(each.name, each.size, each.data is None) for each in read(data, most=1000)] == [
        ("small", 1, False),
        ("large", 5000, True),
        ("after", 1, False),
    ]


FILES = [(f"{i}.txt", bytes([i]) * 700) for i in range(4)]


@given(st.integers(0, 4 * 1536 + 511))
def test_an_archive_cut_anywhere_is_broken(end: int) -> None:
    data = archive(FILES, tarfile.GNU_FORMAT)[:end]
    found: list[TarMember] = []
    with pytest.raises(BrokenTarError):
        found.extend(iterate_members(io.BytesIO(data), 1 << 20))
    assert [(each.name, each.data) for each in found] == FILES[: len(found)]
    assert len(found) >= end // 1536


@given(st.integers(0, 511), st.integers(1, 255))
def test_a_damaged_header_is_noticed(place: int, change: int) -> None:
    data = bytearray(archive(FILES, tarfile.GNU_FORMAT))
    data[1536 + place] ^= change
    try:
        found = read(bytes(data))
    except BrokenTarError:
        return
    assert [each.data for each in found] == [content for _, content in FILES]  # only a byte of the checksum's padding


@given(st.binary(max_size=3000))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    with pytest.raises(BrokenTarError):
        read(data)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@given(st.data())
def test_damage_to_a_compressed_archive_is_noticed(suffix: str, data: st.DataObject) -> None:
    whole = archive(FILES, tarfile.GNU_FORMAT)
    packed = gzip.compress(whole) if suffix == ".gz" else pa.compress(whole, codec="zstd", asbytes=True)
    cut = packed[: data.draw(st.integers(0, len(packed) - 1))]
    with pytest.raises(BrokenTarError):
        list(DecompressedStream(buffered(cut), "x.tar" + suffix).members(1 << 20))


def test_a_flipped_bit_in_a_gzip_is_noticed() -> None:
    packed = bytearray(gzip.compress(archive(FILES, tarfile.GNU_FORMAT)))
    packed[-6] ^= 1  # of the checksum at the end
    with pytest.raises(BrokenTarError):
        list(DecompressedStream(buffered(bytes(packed)), "x.tar.gz").members(1 << 20))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.c/d.seg.png", ("a/b.c/d", "seg.png")),
        ("./x.jpg", ("x", "jpg")),
        ("plain", ("plain", "bin")),
        ("a/.hidden", ("a/.hidden", "bin")),
    ],
)
def test_names_split_as_webdatasets(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected
