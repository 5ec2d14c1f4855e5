"""Order, crops, recoloring and masks: reproducible, elastic, and equal to what the field uses."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as pil
from torchvision.transforms.v2 import functional as tv

import curation
from curation.config import CurateConfig, Exact
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from pretrain.data import color_gpu, sample_order, views
from pretrain.data.color_cpu import adjust_color
from pretrain.data.color_gpu import BLUR, sample_parameters
from pretrain.data.config import Crops, Photometric, Sampling, Views
from pretrain.data.decode import decode, open_image, upright_size
from pretrain.data.loader import BAD_SAMPLE_REASONS, Batch, RankBatchSampler, ViewDataset, batches
from pretrain.data.masks import MaskSettings, batch_masks, block_mask
from pretrain.data.samples import CorpusPart, Samples
from pretrain.data.views import extract_crops, resized_crop_box, safe_draft_scale, sample_crops
from tests.conftest import encode_image, image_folder, ingest_folder, picture

VIEWS = Views(global_crops=Crops(size=32), local_crops=Crops(size=16, scale=(0.1, 0.4)), num_local_crops=2)
MASKS = MaskSettings(patch_size=8, probability=0.5, ratio=(0.1, 0.5), exact=True, shift=False)


@given(st.integers(0, 100), st.sampled_from([(1, 4), (2, 2), (4, 1)]), st.integers(1, 3))
def test_a_step_sees_the_same_samples_on_any_number_of_ranks(step: int, ranks: tuple[int, int], batch: int) -> None:
    world_size, accumulation = ranks
    seen = [
        sample_order.positions_of_rank(step * 4 * batch, micro, rank, world_size, batch)
        for micro in range(accumulation)
        for rank in range(world_size)
    ]
    assert np.concatenate(seen).tolist() == list(range(step * 4 * batch, (step + 1) * 4 * batch))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ViewDataset:
    root = tmp_path_factory.mktemp("data")
    corpora = [
        ingest_folder(image_folder(root / name, 7, first=first), root / f"{name}-corpus")
        for name, first in (("a", 0), ("b", 50))
    ]
    return ViewDataset(samples(*corpora), VIEWS, MASKS, seed=3)


def samples(*corpora: Corpus) -> Samples:
    return Samples([CorpusPart.open(corpus.artifact.url) for corpus in corpora])


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in vars(first))


@pytest.mark.multiprocess
def test_batches_are_the_same_for_any_number_of_workers_and_from_any_step(dataset: ViewDataset) -> None:
    def read(workers: int, first: int) -> list[Batch]:
        return list(batches(dataset, RankBatchSampler(0, 1, 4, 1, first, 6, samples_seen=4 * first), workers))

    alone, helped, resumed = read(0, 0), read(2, 0), read(2, 4)
    assert all(equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert all(equal(a, b) for a, b in zip(alone[4:], resumed, strict=True))
    assert not equal(alone[0], alone[1])


def test_batches_have_the_documented_shapes(dataset: ViewDataset) -> None:
    batch = dataset.batch(np.arange(4))
    assert batch.global_crops.shape == (8, 3, 32, 32)
    assert batch.local_crops.shape == (8, 3, 16, 16)
    assert batch.global_crops.dtype == torch.uint8
    assert batch.masks.shape == (8, 16)
    assert batch.global_photometric.shape == batch.local_photometric.shape == (0, 9)
    assert batch.skipped_counts.tolist() == [0] * len(BAD_SAMPLE_REASONS)


@pytest.mark.multiprocess
def test_a_corpus_gone_bad_is_named_from_a_worker(tmp_path: Path) -> None:
    corpus = ingest_folder(image_folder(tmp_path / "images", 4), tmp_path / "corpus")
    shard = Path(corpus.shard_url(0))
    shard.write_bytes(b"\0" * shard.stat().st_size)
    broken = ViewDataset(samples(corpus), VIEWS, MASKS, seed=0)
    with pytest.raises(UserError, match=r"16 samples in a row cannot be used \(checksum_mismatch 16\)"):
        next(batches(broken, RankBatchSampler(0, 1, 2, 1, 0, 1), workers=1))


def test_bad_samples_are_passed_over_and_counted(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 40)
    (folder / "torn.png").write_bytes(encode_image(picture(8))[:-30])
    (folder / "page.png").write_bytes(encode_image(picture(9))[:60])
    corpus = ingest_folder(folder, tmp_path / "corpus", check="header")
    shard = Path(corpus.shard_url(0))
    content = bytearray(shard.read_bytes())
    content[corpus.index_row(3)["image"]["offset"] + 100] ^= 1
    shard.write_bytes(content)
    data = ViewDataset(samples(corpus), VIEWS, MASKS, seed=0)
    together = data.batch(np.arange(42))
    counts = dict(zip(BAD_SAMPLE_REASONS, together.skipped_counts.tolist(), strict=True))
    assert counts["checksum_mismatch"] >= 1
    assert counts["truncated"] + counts["undecodable"] >= 2
    assert sum(counts.values()) < 8
    apart = [data.batch(np.arange(at, at + 1)) for at in range(42)]
    assert torch.equal(sum(batch.skipped_counts for batch in apart), together.skipped_counts)
    views = torch.cat([batch.local_crops.unflatten(0, (2, 1)) for batch in apart], dim=1).flatten(0, 1)
    assert torch.equal(views, together.local_crops)


def test_a_selection_stands_for_what_it_keeps(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 12)
    (folder / "copy.png").write_bytes((folder / "0003.png").read_bytes())
    corpus = ingest_folder(folder, tmp_path / "corpus")
    config = CurateConfig(steps=[Exact()], corpus=corpus.artifact.url, out=str(tmp_path / "selection"))
    part = CorpusPart.open(curation.run(config).url)
    chosen = Samples([part])
    assert chosen.size == 12
    weights = dict(zip([chosen.key(row) for row in range(12)], part.weights, strict=True))
    assert weights.pop("0003") == 2
    assert set(weights.values()) == {1.0}
    seen = chosen.order(0, Sampling(weighted=True)).rows_at(np.arange(12 * 50))
    counts = np.bincount(seen, minlength=12) / 50
    np.testing.assert_allclose(counts, [12 / 13] * 3 + [24 / 13] + [12 / 13] * 8, atol=0.15)
    assert chosen.read(np.array([0, 11])) == [(folder / f"{i:04d}.png").read_bytes() for i in (0, 11)]


@given(st.integers(8, 300), st.integers(8, 300), st.integers(0, 10_000))
def test_crop_boxes_lie_in_the_image(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = resized_crop_box(width, height, (0.05, 1.0), np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@given(st.integers(50, 3000), st.integers(50, 3000), st.integers(0, 1000))
def test_shrinking_leaves_every_crop_its_pixels(width: int, height: int, seed: int) -> None:
    settings = Views()
    rng = np.random.default_rng(seed)
    crops = [(crop, 224) for crop in sample_crops((width, height), settings.global_crops, 2, settings, rng)]
    crops += [(crop, 96) for crop in sample_crops((width, height), settings.local_crops, 8, settings, rng)]
    factor = safe_draft_scale(crops)
    narrow = [min(crop.box[2] - crop.box[0], crop.box[3] - crop.box[1]) for crop, _ in crops]
    assert factor == 1 or all(side / factor >= size for side, (_, size) in zip(narrow, crops, strict=True))
    assert any(side / (factor + 1) < size for side, (_, size) in zip(narrow, crops, strict=True))


def test_crops_of_a_shrunk_image_are_those_of_the_whole() -> None:
    image = picture(3, (1024, 768))
    settings = Views(color_augment_on="device")
    chosen = sample_crops((1024, 768), settings.local_crops, 4, settings, np.random.default_rng(0))
    whole = extract_crops(np.array(image), (1024, 768), chosen, 96, settings).pixels.astype(float)
    half = np.array(image.resize((512, 384), Image.Resampling.BOX))
    assert np.abs(extract_crops(half, (1024, 768), chosen, 96, settings).pixels - whole).mean() < 2


def test_jpegs_are_decoded_smaller_where_that_harms_nothing() -> None:
    image = picture(3, (1024, 768))
    jpeg, png = encode_image(image, "JPEG", quality=95), encode_image(image)
    small = decode(open_image(jpeg), 2)
    assert small.size == (512, 384)
    assert decode(open_image(png), 2).size == (1024, 768)
    whole = np.asarray(image.resize((512, 384), Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(small, dtype=float) - whole).mean() < 2
    turned = image.getexif()
    turned[0x0112] = 6  # EXIF orientation: lie on the right side
    lying = open_image(encode_image(image, "JPEG", exif=turned))
    assert upright_size(lying) == (768, 1024)
    assert decode(lying, 2).size == (384, 512)


def test_crop_areas_are_spread_as_torchvisions() -> None:
    rng = np.random.default_rng(0)
    boxes = [resized_crop_box(200, 160, (0.32, 1.0), rng) for _ in range(3000)]
    ours = [(right - left) * (bottom - top) / 32_000 for left, top, right, bottom in boxes]
    torch.manual_seed(0)
    blank = torch.empty(3, 160, 200)
    sizes = [RandomResizedCrop.get_params(blank, [0.32, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(3000)]
    theirs = [height * width / 32_000 for height, width in sizes]
    np.testing.assert_allclose(
        np.quantile(ours, [0, 0.25, 0.5, 0.75, 0.95]), np.quantile(theirs, [0, 0.25, 0.5, 0.75, 0.95]), atol=0.02
    )


def test_a_whole_crop_is_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    plain = Crops(size=16, scale=(1.0, 1.0), photometric=[Photometric(jitter_prob=0.0, grayscale_prob=0.0)])
    settings = Views(hflip_prob=0.0)
    chosen = sample_crops((16, 16), plain, 20, settings, np.random.default_rng(1))
    pixels = extract_crops(image, (16, 16), chosen, 16, settings).pixels
    assert any(np.array_equal(crop, image) for crop in pixels)


def parameters(**changes: float) -> torch.Tensor:
    names = ("brightness", "contrast", "saturation", "hue", "gray", "blur", "solarize", "invert", "channels")
    values = dict.fromkeys(names, 0.0) | {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0} | changes
    return torch.tensor([[values[name] for name in names]])


IMAGE = torch.from_numpy(np.random.default_rng(0).random((1, 3, 24, 20), dtype=np.float32))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, IMAGE),
        ({"brightness": 1.3}, tv.adjust_brightness(IMAGE, 1.3)),
        ({"contrast": 0.6}, tv.adjust_contrast(IMAGE, 0.6)),
        ({"saturation": 1.4}, tv.adjust_saturation(IMAGE, 1.4)),
        ({"hue": 0.2}, tv.adjust_hue(IMAGE, 0.2)),
        ({"hue": -0.35}, tv.adjust_hue(IMAGE, -0.35)),
        ({"gray": 1.0}, tv.rgb_to_grayscale(IMAGE, 3)),
        ({"blur": 1.2}, tv.gaussian_blur(IMAGE, [9, 9], [1.2, 1.2])),
        ({"solarize": 1.0}, tv.solarize(IMAGE, 128 / 255)),
        ({"invert": 1.0}, tv.invert(IMAGE)),
        ({"channels": 3.0}, IMAGE[:, [1, 2, 0]]),
    ],
)
def test_recoloring_is_torchvisions(changes: dict[str, float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(color_gpu.apply(IMAGE, parameters(**changes)), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda image: image),
        ({"brightness": 1.3}, lambda image: pil.adjust_brightness(image, 1.3)),
        ({"contrast": 0.6}, lambda image: pil.adjust_contrast(image, 0.6)),
        ({"saturation": 1.4}, lambda image: pil.adjust_saturation(image, 1.4)),
        ({"hue": 0.2}, lambda image: pil.adjust_hue(image, 0.2)),
        ({"hue": -0.35}, lambda image: pil.adjust_hue(image, -0.35)),
        ({"gray": 1.0}, lambda image: pil.to_grayscale(image, 3)),
        ({"blur": 1.2}, lambda image: pil.gaussian_blur(image, [9, 9], [1.2, 1.2])),
        ({"solarize": 1.0}, lambda image: pil.solarize(image, 128)),
        ({"invert": 1.0}, lambda image: pil.invert(image)),
        ({"channels": 3.0}, lambda image: Image.fromarray(np.asarray(image)[..., [1, 2, 0]])),
    ],
)
def test_recoloring_in_workers_is_torchvisions_on_pillow_images(
    changes: dict[str, float], expected: Callable[[Image.Image], Image.Image]
) -> None:
    image = picture(5, (48, 40))
    ours = adjust_color(np.array(image), parameters(**changes)[0].numpy()).astype(int)
    theirs = np.asarray(expected(image)).astype(int)
    most = 12 if "hue" in changes else 1  # Pillow cuts hue and saturation off to 8 bits; OpenCV rounds
    assert np.abs(ours - theirs).max() <= most
    assert np.abs(ours - theirs).mean() <= 1


def test_both_ways_of_recoloring_agree() -> None:
    spec = Photometric(
        jitter_prob=0.8, grayscale_prob=0.2, blur_prob=0.5, solarize_prob=0.0, invert_prob=0.2, channel_shuffle_prob=0.3
    )
    rng = np.random.default_rng(0)
    table = np.stack([sample_parameters(spec, rng) for _ in range(40)])
    images = np.stack([np.array(picture(seed)) for seed in range(40)])
    on_device = color_gpu.apply(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, torch.from_numpy(table))
    in_workers = np.stack([adjust_color(image, row) for image, row in zip(images, table, strict=True)])
    difference = np.abs(on_device.permute(0, 2, 3, 1).numpy() * 255 - in_workers)
    assert difference.mean() < 1
    assert np.quantile(difference, 0.99) < 6


@pytest.mark.parametrize("size", [16, 56, 96])
def test_crops_are_resized_as_pillow_does(size: int) -> None:
    image = picture(6, (70, 60))
    box = (3, 5, 63, 53)
    ours = views._resize(np.array(image), box, size, flipped=False).astype(int)
    theirs = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - theirs).max() <= 2
    assert np.array_equal(views._resize(np.array(image), box, size, flipped=True), ours[:, ::-1])


def test_each_image_of_a_batch_has_its_own_recoloring() -> None:
    table = torch.cat([parameters(), parameters(invert=1.0), parameters(blur=1.0), parameters(hue=0.1)])
    together = color_gpu.apply(IMAGE.expand(4, -1, -1, -1), table)
    apart = torch.cat([color_gpu.apply(IMAGE, row[None]) for row in table])
    torch.testing.assert_close(together, apart)


def test_recoloring_is_drawn_as_often_as_asked() -> None:
    spec = Photometric(
        jitter_prob=0.8, grayscale_prob=0.2, blur_prob=0.5, solarize_prob=0.2, invert_prob=0.1, channel_shuffle_prob=0.3
    )
    rng = np.random.default_rng(0)
    table = np.stack([color_gpu.sample_parameters(spec, rng) for _ in range(4000)])
    shares = [
        (table[:, column] != neutral).mean() for column, neutral in ((3, 0), (4, 0), (5, 0), (6, 0), (7, 0), (8, 0))
    ]
    np.testing.assert_allclose(shares, [0.8, 0.2, 0.5, 0.2, 0.1, 0.3], atol=0.03)
    assert 0.6 <= table[:, 0].min() < 0.65
    assert 1.35 < table[:, 0].max() <= 1.4


@settings(max_examples=50)
@given(st.integers(4, 20), st.integers(0, 10_000), st.floats(0.1, 0.5))
def test_block_masks_stay_below_their_target(side: int, seed: int, share: float) -> None:
    target = int(share * side * side)
    assert block_mask(side, side, target, np.random.default_rng(seed)).sum() <= target


def test_half_the_crops_are_masked_with_shares_over_the_range() -> None:
    plan = MaskSettings(patch_size=16, probability=0.5, ratio=(0.1, 0.5), exact=False, shift=False)
    shares = batch_masks(200, (14, 14), plan, np.random.default_rng(0)).mean(1)
    assert (shares > 0).sum() == 100
    assert 0.2 < shares[shares > 0].mean() < 0.35
    assert shares.max() <= 0.5


@pytest.mark.parametrize("shift", [False, True])
def test_dinov3s_masks_have_exactly_the_number_asked_for(shift: bool) -> None:
    plan = MaskSettings(patch_size=16, probability=0.5, ratio=(0.1, 0.5), exact=True, shift=shift)
    masks = batch_masks(40, (14, 14), plan, np.random.default_rng(0))
    wanted = [int(196 * share) for share in np.linspace(0.1, 0.5, 21)[1:]]
    assert sorted(masks.sum(1)[masks.any(1)]) == wanted


def test_inverted_blur_blurs_with_one_minus_the_probability() -> None:
    rng = np.random.default_rng(0)
    sure = Photometric(blur_prob=1.0)
    assert all(sample_parameters(sure, rng, inverted_blur=True)[BLUR] == 0 for _ in range(50))
    assert all(sample_parameters(sure, rng)[BLUR] > 0 for _ in range(50))


def test_plain_crops_are_the_global_crops_larger() -> None:
    gradient = np.linspace(0, 255, 64, dtype=np.uint8)
    image = np.stack([np.tile(gradient, (64, 1))] * 3, axis=-1)
    settings = Views(color_augment_on="device")
    chosen = sample_crops((64, 64), Crops(size=16), 20, settings, np.random.default_rng(0))
    crops = extract_crops(image, (64, 64), chosen, 16, settings, gram_size=32)
    assert crops.gram_pixels.shape == (20, 32, 32, 3)
    smaller = crops.gram_pixels.reshape(20, 16, 2, 16, 2, 3).mean((2, 4))
    np.testing.assert_allclose(smaller, crops.pixels, atol=3)


FORKS = """
import multiprocessing, os, sys
from prefect.logging.handlers import APILogWorker
from pretrain.data.loader import _init_worker

APILogWorker.instance()  # a service, as a flow starts it
target, arguments = (_init_worker, (0,)) if sys.argv[1] == "loader" else (print, ())
child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
child.start()
child.join()
print(child.exitcode, flush=True)
os._exit(0)
"""


def test_loader_workers_end_well_after_a_flow_in_their_parent() -> None:
    """Other forked processes end with 1; once they do not, Prefect has mended it and the loader's care can go."""
    codes = []
    for what in ("loader", "other"):
        done = subprocess.run([sys.executable, "-c", FORKS, what], capture_output=True, text=True, check=True)
        codes += done.stdout.split()
    assert codes == ["0", "1"]
