"""Perceptual hashes, and what a small picture tells, against brute force and other libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy.fft import dctn
from skimage.measure import shannon_entropy

from curation.image_stats import ImageStats, load_gray, measure_images, phash
from curation.similarity.hamming import pairs_within
from curation.similarity.tiles import CpuTiles, WorkerPool
from curation.synthetic.corpus import encode, load_photographs
from infra.corpus.corpus import Corpus
from tests.conftest import encode_image
from tests.pools import Pool, curated, written

ONE = WorkerPool(CpuTiles(), 1)
PIECES = 160


def photographs() -> list[np.ndarray]:
    return list(load_photographs().values())


def jpeg(pixels: np.ndarray, quality: int) -> bytes:
    return encode(pixels, format="JPEG", quality=quality)


def resized(pixels: np.ndarray, share: float) -> np.ndarray:
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.LANCZOS))


def test_what_is_transparent_is_white_in_gray_too() -> None:
    pixels = np.full((16, 16), 7, dtype=np.uint8)
    pixels[:, 8:] = 90
    seen = load_gray(encode_image(Image.fromarray(pixels), transparency=7))
    assert seen is not None
    assert (seen[:, :8] == 255).all()
    assert (seen[:, 8:] == 90).all()


def test_the_hash_is_that_of_its_definition() -> None:
    small = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    for picture, found in zip(small, phash(small), strict=True):
        low = dctn(picture.astype(float), norm="ortho")[:8, :8].ravel()
        bits = low > np.median(low[1:])
        assert int("".join("01"[int(bit)] for bit in bits), 2) == int(found)


def test_copies_have_near_hashes_and_other_pictures_have_not() -> None:
    pictures = photographs()
    copies = [load_gray(jpeg(resized(picture, 0.6), 60)) for picture in pictures]
    hashes, others = (
        measure_images(each)["phash"].to_numpy() for each in ([load_gray(encode(p)) for p in pictures], copies)
    )
    distance = np.bitwise_count(hashes[:, None] ^ others[None])
    assert np.diag(distance).max() <= 10  # of bricks; of most it is 0
    assert distance[~np.eye(len(pictures), dtype=bool)].min() > 16


def test_entropy_is_that_of_scikit_image_and_blurring_takes_sharpness() -> None:
    picture = photographs()[0]
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(6)))
    flat = np.full((64, 64, 3), 90, dtype=np.uint8)
    pixels = [load_gray(encode(each)) for each in (picture, blurred, flat)]
    table = measure_images([*pixels, None])
    expected = [shannon_entropy(each) for each in pixels]
    np.testing.assert_allclose(table["entropy"].to_numpy()[:3], expected, rtol=1e-5)
    sharp, soft, none, nothing = table["sharpness"].to_pylist()
    assert sharp > 4 * soft > none == 0
    assert nothing is None
    assert table["phash"][3].as_py() is None


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(0, 12), st.integers(0, 120))
def test_pairs_within_a_radius_are_those_of_brute_force(seed: int, radius: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**63, 8, dtype=np.uint64)
    flips = rng.random((n, 64)) < rng.uniform(0, 0.15)
    masks = np.packbits(flips, axis=1).view(">u8").astype(np.uint64).ravel()
    hashes = np.unique(base[rng.integers(0, 8, n)] ^ masks)
    found = {
        (int(min(a, b)), int(max(a, b)), int(d))
        for some in pairs_within(hashes, radius)
        for a, b, d in zip(*some, strict=True)
    }
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = {
        (int(a), int(b), int(distance[a, b])) for a, b in zip(*np.nonzero(distance <= radius), strict=True) if a < b
    }
    assert found == expected


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Pieces of photographs, smaller and recompressed copies of nine of them, and two images of one color."""
    rng = np.random.default_rng(0)
    whole = [load_photographs()[name] for name in ("astronaut", "chelsea", "coffee", "china", "flower", "motorcycle")]
    places = rng.integers(0, 100, (PIECES, 2))
    pieces = [whole[i % len(whole)][y : y + 200, x : x + 200] for i, (y, x) in enumerate(places)]
    images = [encode(piece) for piece in pieces]
    images += [jpeg(resized(piece, 0.75), 80) for piece in pieces[:9]]
    images += [encode(np.full((40, 40, 3), value, dtype=np.uint8)) for value in (10, 200)]
    return written(tmp_path_factory.mktemp("copies"), images)


@pytest.mark.parametrize("kind", ["dct", "pca"])
def test_perceptual_copies_go_and_the_largest_stays(copies: Pool, tmp_path: Path, kind: str) -> None:
    radius = {"dct": 8, "pca": 6}[kind]
    _, ledger = curated(tmp_path, copies, {"kind": "perceptual", "hash": kind, "radius": radius})
    winners = [int(ledger[PIECES + i]["matched_key"][1:]) for i in range(9)]
    assert all(winner < PIECES for winner in winners)  # the larger ones
    assert np.mean(np.equal(winners, range(9))) > 0.75
    assert all(ledger[PIECES + i]["score"] >= 1 - radius / 64 for i in range(9))
    assert np.mean([row["keep"] for row in ledger[:PIECES]]) > 0.75  # some pieces overlap


def test_blank_and_blurred_images_are_dropped(copies: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_CACHE", str(tmp_path / "cache"))
    artifact, ledger = curated(tmp_path, copies, {"kind": "image_quality"})
    assert [row["reason"] for row in ledger[-2:]] == ["blank", "blank"]
    assert artifact.metrics["kept"] == len(ledger) - 2
    softest = pq.read_table(next((tmp_path / "cache" / "image_stats").rglob("*.parquet")))["sharpness"].to_numpy()[
        :PIECES
    ]
    step = {"kind": "image_quality", "min_sharpness": float(np.median(softest))}
    _, ledger = curated(tmp_path, copies, step)
    blurred = [row["reason"] == "blurred" for row in ledger[:PIECES]]
    np.testing.assert_array_equal(blurred, softest < np.float32(step["min_sharpness"]))


def test_an_interrupted_look_goes_on(copies: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.image_stats._BLOCK", 5)
    corpus, seen = Corpus.open(copies.corpus), []

    def stop(share: float) -> None:
        seen.append(share)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ImageStats(corpus, tmp_path / "looks").table(ONE, stop, ["phash"])
    made = sorted((tmp_path / "looks").rglob("*.parquet"))
    stamps = [path.stat().st_mtime_ns for path in made]
    again = ImageStats(corpus, tmp_path / "looks").table(ONE, seen.append, ["phash"])
    assert [path.stat().st_mtime_ns for path in made] == stamps
    assert again.equals(ImageStats(corpus, tmp_path / "other").table(ONE, seen.append, ["phash"]))
    assert len(again) == len(corpus)
