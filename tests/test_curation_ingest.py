"""Ingest: everything usable in the index, everything else listed with its reason."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from curation.ingest.sources import find_units
from infra.corpus.corpus import REJECTED, Corpus
from infra.errors import UserError
from pretrain.data.decode import REASONS, ImageRejected, decode_rgb
from tests.conftest import SyntheticCorpora, encode_image, image_folder, ingest_folder, picture


def rejected(corpus: Corpus) -> dict[str, str]:
    """Reasons by the paths of what was left out."""
    table = pq.read_table(corpus.artifact.local_file(REJECTED))
    return dict(zip(table["path"].to_pylist(), table["reason"].to_pylist(), strict=True))


def tar(path: Path, members: dict[str, bytes]) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    data = buffer.getvalue()
    if path.name.endswith(".gz"):
        data = gzip.compress(data)
    elif path.name.endswith(".zst"):
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return path


def test_the_synthetic_pool_is_split_into_usable_and_broken(synthetic: SyntheticCorpora) -> None:
    corpus = Corpus.open(synthetic.pool)
    reasons = corpus.artifact.metrics["rejected"]
    assert reasons == {"empty": 2, "not_an_image": 4, "too_many_pixels": 2, "truncated": 2}
    assert len(corpus) + 10 == len(list((synthetic.folder / "pool").iterdir()))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("1", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("I;16", "PNG")],
)
def test_every_mode_becomes_rgb(mode: str, kind: str) -> None:
    if mode == "I;16":
        image = Image.new("I;16", (8, 8), 40_000)
    else:
        image = picture(1).convert(mode)
    decoded = decode_rgb(encode_image(image, kind))
    assert decoded.mode == "RGB"
    assert decoded.size == image.size
    if mode == "I;16":
        assert decoded.getpixel((0, 0)) == (156, 156, 156)


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((7, 7), (0, 0, 255, 255))
    assert decode_rgb(encode_image(image)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_rgb(encode_image(image)).getpixel((7, 7)) == (0, 0, 255)


def test_a_turned_photograph_is_put_upright() -> None:
    image = picture(1, (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(encode_image(image, "JPEG", exif=exif)).size == (20, 40)


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_decoder(data: bytes) -> None:
    with pytest.raises(ImageRejected) as caught:
        decode_rgb(data)
    assert caught.value.reason in REASONS


@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF"]), st.data())
def test_no_damage_to_an_image_crashes_the_decoder(kind: str, data: st.DataObject) -> None:
    content = bytearray(encode_image(picture(2), kind))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    try:
        assert decode_rgb(bytes(content[:cut])).mode == "RGB"
    except ImageRejected as error:
        assert error.reason in REASONS


def test_class_folders_become_labels(tmp_path: Path) -> None:
    corpus = ingest_folder(image_folder(tmp_path / "images", 9, classes=3), tmp_path / "corpus")
    assert corpus.classes == ["class0", "class1", "class2"]
    assert [f"class{label}" for label in corpus.labels] == [key.split("/")[0] for key in corpus.keys]


def marked(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def test_images_of_one_name_keep_their_extension_in_the_key(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode_image(picture(1)))
    (folder / "a.jpg").write_bytes(encode_image(picture(2), "JPEG"))
    (folder / "b.v2.png").write_bytes(encode_image(picture(3)))
    (folder / "lonely.txt").write_text("a caption without an image")
    corpus = ingest_folder(folder, tmp_path / "corpus")
    assert corpus.keys == [f"{name.replace('.', '_')}-{marked(name)}" for name in ("a.jpg", "a.png", "b.v2")]
    assert rejected(corpus) == {"lonely.txt": "no_image"}


def test_small_images_and_bombs_are_turned_away(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 1)
    (folder / "tiny.png").write_bytes(encode_image(picture(1, (4, 40))))
    (folder / "big.png").write_bytes(encode_image(picture(1, (100, 100))))
    corpus = ingest_folder(folder, tmp_path / "corpus", max_pixels=5000)
    assert rejected(corpus) == {"tiny.png": "too_small", "big.png": "too_many_pixels"}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_shards_of_others_are_read_as_they_are(tmp_path: Path, suffix: str) -> None:
    members = {
        f"{i}.{ext}": data
        for i in range(6)
        for ext, data in (("jpg", encode_image(picture(i), "JPEG")), ("cls", b"%d" % (i % 2)), ("txt", b"blob"))
    }
    folder = tmp_path / "shards"
    folder.mkdir()
    tar(folder / f"x-000{suffix}", members)
    corpus = ingest_folder(folder, tmp_path / "corpus")
    assert corpus.keys == [str(i) for i in range(6)]
    assert corpus.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert corpus.table["caption"].to_pylist() == ["blob"] * 6
    assert [corpus.read_image(row) for row in range(6)] == [members[f"{i}.jpg"] for i in range(6)]
    in_place = not (tmp_path / "corpus" / "shards").exists()
    assert in_place == (suffix == ".tar")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_a_shard_cut_short_gives_what_it_has(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    whole = tar(folder / f"a{suffix}", {f"a{i}.png": encode_image(picture(i)) for i in range(8)})
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    tar(folder / f"b{suffix}", {f"b{i}.png": encode_image(picture(i)) for i in range(3)})
    corpus = ingest_folder(folder, tmp_path / "corpus")
    assert rejected(corpus) == {f"a{suffix}": "broken_shard"}
    assert {"b0", "b1", "b2"} <= set(corpus.keys)
    assert suffix == ".tar.zst" or {"a0", "a1"} <= set(corpus.keys)  # zstd packs all of them into one block
    assert all(decode_rgb(corpus.read_image(row)) for row in range(len(corpus)))


def test_a_key_repeated_in_a_shard_is_listed(tmp_path: Path) -> None:
    image = encode_image(picture(1))
    tar(tmp_path / "a.tar", {"same.png": image, "other.png": image, "./same.png": image})
    corpus = ingest_folder(tmp_path / "a.tar", tmp_path / "corpus")
    assert corpus.keys == ["same", "other"]
    assert rejected(corpus) == {"a.tar/./same.png": "duplicate_key"}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_keys_that_shards_share_get_the_shards_name(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b/a"):
        path = tmp_path / "shards" / f"{name}{suffix}"
        path.parent.mkdir(parents=True)
        tar(path, {f"{i}.png": encode_image(picture(i)) for i in range(2)})
    corpus = ingest_folder(tmp_path / "shards", tmp_path / "corpus")
    assert corpus.keys == ["a/0", "a/1", "b/a/0", "b/a/1"]
    assert [corpus.read_image(row) for row in range(4)] == [encode_image(picture(i)) for i in (0, 1, 0, 1)]


def test_shards_and_loose_images_are_not_mixed(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 2)
    tar(folder / "x.tar", {"a.png": encode_image(picture(1))})
    with pytest.raises(UserError, match=r"holds shards \(x.tar\) and loose images \(0000.png\)"):
        ingest_folder(folder, tmp_path / "corpus")


def test_what_img2dataset_wrote_is_indexed(tmp_path: Path) -> None:
    folder = tmp_path / "laion"
    folder.mkdir()
    members = {}
    for i in range(3):
        members[f"00000000{i}.jpg"] = encode_image(picture(i), "JPEG")
        members[f"00000000{i}.json"] = b'{"url": "http://example.org", "status": "success"}'
        members[f"00000000{i}.txt"] = f"caption {i}".encode()
    tar(folder / "00000.tar", members)
    (folder / "00000.parquet").write_bytes(b"PAR1")
    (folder / "00000_stats.json").write_text("{}")
    corpus = ingest_folder(folder, tmp_path / "corpus")
    assert corpus.keys == [f"00000000{i}" for i in range(3)]
    assert corpus.captions.to_pylist() == [f"caption {i}" for i in range(3)]
    assert set(rejected(corpus).values()) == {"img2dataset_record"}


def test_what_else_shards_hold_harms_nobody(tmp_path: Path) -> None:
    image = encode_image(picture(1))
    members = {
        "../../escape.png": image,
        "up/../../down.png": image,
        "../up.png": image,
        "/etc/absolute.png": image,
        "pickled.png": image,
        "pickled.pkl": b"cos\nsystem\n(S'exit 1'\ntR.",
        "only.pkl": b"cos\nsystem\n(S'exit 1'\ntR.",
        "said.png": image,
        "said.txt": b"caf\xe9",
        "zero.png": b"",
        "large.png": b"\0" * (1 << 20) + b"1",
    }
    tar(tmp_path / "x.tar", members)
    corpus = ingest_folder(tmp_path / "x.tar", tmp_path / "corpus", max_file_mb=1)
    assert corpus.keys == ["etc/absolute", "pickled", "said"]
    assert corpus.table["caption"].to_pylist() == [None] * 3
    assert rejected(corpus) == {
        "x.tar/../../escape.png": "unsafe_key",
        "x.tar/up/../../down.png": "unsafe_key",
        "x.tar/../up.png": "unsafe_key",
        "x.tar/only.pkl": "no_image",
        "x.tar/said.txt": "caption_not_utf8",
        "x.tar/zero.png": "empty",
        "x.tar/large.png": "too_many_bytes",
    }
    assert not list(tmp_path.glob("**/*.png"))


def test_headers_alone_give_the_same_index(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 6)
    turned = Image.Exif()
    turned[0x0112] = 6
    (folder / "turned.jpg").write_bytes(encode_image(picture(7, (40, 20)), "JPEG", exif=turned))
    (folder / "torn.png").write_bytes(encode_image(picture(8))[:-30])
    decoded = ingest_folder(folder, tmp_path / "decoded")
    read = ingest_folder(folder, tmp_path / "read", check="header")
    assert rejected(decoded) == {"torn.png": "truncated"}
    assert not rejected(read)
    columns = ["key", "width", "height", "sha256"]
    kept = [row for row in read.table.select(columns).to_pylist() if row["key"] != "torn"]
    assert kept == decoded.table.select(columns).to_pylist()


def shards(folder: Path, count: int, suffix: str = ".tar") -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        tar(folder / f"{i:03d}{suffix}", {f"{i}-{j}.png": encode_image(picture(10 * i + j)) for j in range(5)})
    return folder


@pytest.mark.multiprocess
@pytest.mark.parametrize("suffix", ["", ".tar", ".tar.gz"])
def test_many_processes_make_the_same_corpus(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shards(tmp_path / "source", 4, suffix) if suffix else image_folder(tmp_path / "source", 40)
    monkeypatch.setattr("curation.ingest.ingest._ALONE", 0)
    monkeypatch.setattr(
        "curation.ingest.ingest.find_units", lambda url, size, suffixes: find_units(url, 20_000, suffixes)
    )
    corpora = []
    for workers in (1, 3):
        monkeypatch.setenv("FOVEA_CACHE", str(tmp_path / f"cache{workers}"))
        corpora.append(ingest_folder(source, tmp_path / f"out{workers}", workers=workers))
    assert corpora[0].artifact.manifest.files == corpora[1].artifact.manifest.files
    assert len(corpora[0].shards) > 2


def test_brace_ranges_and_globs_name_shards(tmp_path: Path) -> None:
    for i in range(3):
        tar(tmp_path / f"s-{i:03d}.tar", {f"k{i}.png": encode_image(picture(i))})
    ranged = ingest_folder(tmp_path / "s-{000..001}.tar", tmp_path / "ranged")
    globbed = ingest_folder(tmp_path / "s-*.tar", tmp_path / "globbed")
    assert ranged.keys == ["k0", "k1"]
    assert globbed.keys == ["k0", "k1", "k2"]


def test_labels_come_from_a_json_field(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 4)
    for i, path in enumerate(sorted(folder.glob("*.png"))):
        path.with_suffix(".json").write_text(f'{{"source": "s{i % 2}"}}')
    corpus = ingest_folder(folder, tmp_path / "corpus", labels="json", label_field="source")
    assert corpus.classes == ["s0", "s1"]
    assert corpus.labels.tolist() == [0, 1, 0, 1]


def test_the_id_follows_the_content_not_the_place(tmp_path: Path) -> None:
    ids = [
        ingest_folder(image_folder(tmp_path / name, 4), tmp_path / f"corpus-{name}").artifact.id
        for name in ("here", "there")
    ]
    assert ids[0] == ids[1]
    (tmp_path / "here" / "0000.png").write_bytes(encode_image(picture(99)))
    assert ingest_folder(tmp_path / "here", tmp_path / "again").artifact.id != ids[0]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "not found"),
        (lambda path: path.mkdir(), "no files here"),
        (
            lambda path: (path.mkdir(), (path / "x.jpg").write_bytes(b"")),
            r"no usable image among 1 files: empty 1 \(x.jpg\)",
        ),
    ],
)
def test_nothing_to_read_is_said_plainly(tmp_path: Path, make: object, expected: str) -> None:
    make(tmp_path / "images")  # type: ignore[operator]
    with pytest.raises(UserError, match=expected):
        ingest_folder(tmp_path / "images", tmp_path / "corpus")


def test_real_shards_are_indexed_in_place(shared_data: Path, tmp_path: Path) -> None:
    corpus = ingest_folder(shared_data / "webpool" / "pool-000000.tar", tmp_path / "webpool")
    assert corpus.artifact.metrics["rejected"] == {}
    assert not (tmp_path / "webpool" / "shards").exists()
    assert decode_rgb(corpus.read_image(7)).size == (
        corpus.table["width"][7].as_py(),
        corpus.table["height"][7].as_py(),
    )
