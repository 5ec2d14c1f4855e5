"""Order, crops, recolouring and masks: reproducible, elastic, and equal to what the field uses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from infra.errors import UserError
from pretrain.data import order, photometric
from pretrain.data.config import Crops, Photometric, Views
from pretrain.data.decode import decode_rgb
from pretrain.data.loader import Batch, Place, ViewDataset, batches
from pretrain.data.masks import MaskPlan, batch_masks, block_mask
from pretrain.data.photometric import BLUR, draw
from pretrain.data.views import cut, harmless_shrink, resized_crop_box
from tests.conftest import encoded, image_folder, ingested, picture

VIEWS = Views(globals=Crops(size=32), locals=Crops(size=16, scale=(0.1, 0.4)), local_count=2)
MASKS = MaskPlan(patch_size=8, share=0.5, ratio=(0.1, 0.5), exact=True, shift=False)


@given(st.integers(0, 1000), st.integers(1, 50), st.integers(0, 5))
def test_every_epoch_shows_every_sample_once(seed: int, size: int, epoch: int) -> None:
    positions = np.arange(epoch * size, (epoch + 1) * size)
    assert sorted(order.rows_at(positions, seed, size)) == list(range(size))


@given(st.integers(0, 100), st.sampled_from([(1, 4), (2, 2), (4, 1)]), st.integers(1, 3))
def test_a_step_sees_the_same_samples_on_any_number_of_ranks(step: int, ranks: tuple[int, int], batch: int) -> None:
    world_size, accumulation = ranks
    seen = [
        order.positions_of(step, micro, rank, world_size, batch, accumulation)
        for micro in range(accumulation)
        for rank in range(world_size)
    ]
    assert np.concatenate(seen).tolist() == list(range(step * 4 * batch, (step + 1) * 4 * batch))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ViewDataset:
    root = tmp_path_factory.mktemp("data")
    corpora = [
        ingested(image_folder(root / name, 7, first=first), root / f"{name}-corpus")
        for name, first in (("a", 0), ("b", 50))
    ]
    return ViewDataset(corpora, VIEWS, MASKS, seed=3)


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in vars(first))


@pytest.mark.multiprocess
def test_batches_are_the_same_for_any_number_of_workers_and_from_any_step(dataset: ViewDataset) -> None:
    def read(workers: int, first: int) -> list[Batch]:
        return list(batches(dataset, Place(0, 1, 4, 1, first, 6), workers))

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
    assert batch.global_photometric.shape == batch.local_photometric.shape == (8, 9)


@pytest.mark.multiprocess
def test_a_sample_gone_bad_is_named_from_a_worker(tmp_path: Path) -> None:
    corpus = ingested(image_folder(tmp_path / "images", 4), tmp_path / "corpus")
    shard = Path(corpus.shard_url(0))
    shard.write_bytes(b"\0" * shard.stat().st_size)
    broken = ViewDataset([corpus], VIEWS, MASKS, seed=0)
    with pytest.raises(UserError, match=r"sample 000[0-3] is not_an_image now"):
        next(batches(broken, Place(0, 1, 2, 1, 0, 1), workers=1))


@given(st.integers(8, 300), st.integers(8, 300), st.integers(0, 10_000))
def test_crop_boxes_lie_in_the_image(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = resized_crop_box(width, height, (0.05, 1.0), np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@given(st.integers(50, 4000), st.integers(50, 4000))
def test_shrinking_leaves_the_smallest_crops_their_pixels(width: int, height: int) -> None:
    views = Views()
    factor = harmless_shrink(width, height, views)
    assert factor >= 1
    if factor > 1:
        smallest = math.sqrt(0.05 * width * height) / factor, math.sqrt(0.32 * width * height) / factor
        assert smallest[0] >= 96
        assert smallest[1] >= 224


def test_jpegs_are_decoded_smaller_where_that_harms_nothing() -> None:
    image = picture(3, (1024, 768))
    jpeg, png = encoded(image, "JPEG", quality=95), encoded(image)
    small = decode_rgb(jpeg, shrink=lambda width, height: 2)
    assert small.size == (512, 384)
    assert decode_rgb(png, shrink=lambda width, height: 2).size == (1024, 768)
    whole = np.asarray(image.resize((512, 384), Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(small, dtype=float) - whole).mean() < 2
    turned = image.getexif()
    turned[0x0112] = 6  # EXIF orientation: lie on the right side
    assert decode_rgb(encoded(image, "JPEG", exif=turned), shrink=lambda width, height: 2).size == (384, 512)


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
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    pixels = cut(image, Crops(size=16, scale=(1.0, 1.0)), 20, Views(flip=0.0), np.random.default_rng(1)).pixels
    assert any(np.array_equal(crop, np.asarray(image)) for crop in pixels)


def parameters(**changes: float) -> torch.Tensor:
    names = ("brightness", "contrast", "saturation", "hue", "grey", "blur", "solarize", "invert", "channels")
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
        ({"grey": 1.0}, tv.rgb_to_grayscale(IMAGE, 3)),
        ({"blur": 1.2}, tv.gaussian_blur(IMAGE, [9, 9], [1.2, 1.2])),
        ({"solarize": 1.0}, tv.solarize(IMAGE, 128 / 255)),
        ({"invert": 1.0}, tv.invert(IMAGE)),
        ({"channels": 3.0}, IMAGE[:, [1, 2, 0]]),
    ],
)
def test_recolouring_is_torchvisions(changes: dict[str, float], expected: torch.Tensor) -> None:
    torch.testing.assert_close(photometric.apply(IMAGE, parameters(**changes)), expected, atol=2e-4, rtol=0)


def test_each_image_of_a_batch_has_its_own_recolouring() -> None:
    table = torch.cat([parameters(), parameters(invert=1.0), parameters(blur=1.0), parameters(hue=0.1)])
    together = photometric.apply(IMAGE.expand(4, -1, -1, -1), table)
    apart = torch.cat([photometric.apply(IMAGE, row[None]) for row in table])
    torch.testing.assert_close(together, apart)


def test_recolouring_is_drawn_as_often_as_asked() -> None:
    spec = Photometric(jitter=0.8, grey=0.2, blur=0.5, solarize=0.2, invert=0.1, channels=0.3)
    rng = np.random.default_rng(0)
    table = np.stack([photometric.draw(spec, rng) for _ in range(4000)])
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
    plan = MaskPlan(patch_size=16, share=0.5, ratio=(0.1, 0.5), exact=False, shift=False)
    shares = batch_masks(200, (14, 14), plan, np.random.default_rng(0)).mean(1)
    assert (shares > 0).sum() == 100
    assert 0.2 < shares[shares > 0].mean() < 0.35
    assert shares.max() <= 0.5


@pytest.mark.parametrize("shift", [False, True])
def test_dinov3s_masks_have_exactly_the_number_asked_for(shift: bool) -> None:
    plan = MaskPlan(patch_size=16, share=0.5, ratio=(0.1, 0.5), exact=True, shift=shift)
    masks = batch_masks(40, (14, 14), plan, np.random.default_rng(0))
    wanted = [int(196 * share) for share in np.linspace(0.1, 0.5, 21)[1:]]
    assert sorted(masks.sum(1)[masks.any(1)]) == wanted


def test_inverted_blur_blurs_with_one_minus_the_probability() -> None:
    rng = np.random.default_rng(0)
    sure = Photometric(blur=1.0)
    assert all(draw(sure, rng, inverted_blur=True)[BLUR] == 0 for _ in range(50))
    assert all(draw(sure, rng)[BLUR] > 0 for _ in range(50))


def test_plain_crops_are_the_global_crops_larger() -> None:
    gradient = np.linspace(0, 255, 64, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.tile(gradient, (64, 1))] * 3, axis=-1))
    crops = cut(image, Crops(size=16), 20, Views(), np.random.default_rng(0), plain_size=32)
    assert crops.plain.shape == (20, 32, 32, 3)
    smaller = crops.plain.reshape(20, 16, 2, 16, 2, 3).mean((2, 4))
    np.testing.assert_allclose(smaller, crops.pixels, atol=3)
