"""Protocols of patch tokens, on images whose colors tell the truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import multiclass_jaccard_index

from eval.data import dense_labels
from eval.protocols import correspondence, depth, segmentation, video_segmentation
from eval.protocols.config import Correspondence, Depth, KnnSegmentation, Segmentation, VideoSegmentation
from eval.report.pictures.patches import patch_pca, principal_colors
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from tests.eval_contexts import Colors, first_of, make_context, make_model, png, samples

COLORS = np.array([[20, 20, 20], [220, 40, 40], [40, 220, 40], [40, 40, 220]])
NUMBERS = np.array([0, 3, 7, 90])


def scene(seed: int, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """An image of boxes on dark ground, uint8 `[side, side, 3]`, and its mask."""
    rng = np.random.default_rng(seed)
    place = np.zeros((side, side), dtype=int)
    for color in rng.permutation([1, 2, 3]):
        top, left = rng.integers(0, side - 24, 2)
        place[top : top + 24, left : left + 24] = color
    noisy = COLORS[place] + rng.normal(scale=8, size=(side, side, 3))
    return noisy.clip(0, 255).astype(np.uint8), NUMBERS[place].astype(np.uint8)


def scenes(folder: Path, count: int, first: int) -> Corpus:
    members = {}
    for number in range(first, first + count):
        image, mask = scene(number)
        members[f"{number:03d}"] = {"jpg": _jpeg(image), "seg.png": png(mask)}
    return samples(folder, members)


def _jpeg(image: np.ndarray) -> bytes:
    from tests.conftest import encode_image

    return encode_image(Image.fromarray(image), "JPEG", quality=95)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    folder = tmp_path_factory.mktemp("scenes")
    return {"train": scenes(folder / "train", 12, 0), "test": scenes(folder / "test", 6, 100)}


@pytest.mark.parametrize("kind", ["segmentation", "knn_segmentation"])
def test_what_colors_tell_is_segmented(kind: str, sets: dict[str, Corpus], tmp_path: Path) -> None:
    options = {"steps": 300, "batch": 4} if kind == "segmentation" else {"k": 5}
    opened = make_context(sets, [{"kind": kind, "grid": 16, **options}], pictures=3)
    task = opened.settings.tasks[0]
    assert isinstance(task, Segmentation | KnnSegmentation)
    run = {"segmentation": segmentation.segmentation, "knn_segmentation": segmentation.knn_segmentation}[kind]
    outcome = run(task, make_model(tmp_path, backbone=Colors()), opened)
    score = outcome.scores[0]
    assert score.value > 0.8
    assert score.low is not None
    assert score.low <= score.value
    assert set(outcome.pictures) == {"masks"}


def test_miou_is_that_of_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    classes = np.array([0, 3, 7, 90, 120])
    areas = np.zeros((2, 5, len(classes)))
    answers, truths = [], []
    for row in range(5):
        truth = rng.choice([0, 3, 7, 255], (20, 30))  # 90 is an answer only, 120 nowhere
        found = torch.from_numpy(rng.integers(0, 4, (20, 30)))
        matrix = segmentation._confusion(found, truth, classes)
        areas[:, row] = np.diag(matrix), matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
        answers.append(found)
        truths.append(torch.from_numpy(np.select([truth == c for c in classes], range(5), 5)))
    theirs = multiclass_jaccard_index(torch.stack(answers), torch.stack(truths), 6, ignore_index=5)
    assert segmentation.intersection_over_union(*areas.sum(1)) == pytest.approx(float(theirs), abs=1e-6)


def test_shares_of_a_patch_are_counted_by_pixels() -> None:
    rng = np.random.default_rng(0)
    values = rng.choice([1, 5, 255], (32, 48)).astype(np.uint8)
    shares = dense_labels.patch_class_fractions(values, np.array([1, 5]), (4, 6), 32)
    cells = values.reshape(4, 8, 6, 8)
    for column, number in enumerate((1, 5)):
        np.testing.assert_allclose(shares[:, column], (cells == number).mean((1, 3)).ravel(), atol=1e-6)


def test_segmentation_on_real_masks(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "coco_mini"
    sets = {
        "train": first_of(folder / "train-000000.tar", 20, tmp_path / "train"),
        "test": first_of(folder / "val-000000.tar", 12, tmp_path / "test"),
    }
    opened = make_context(sets, [{"kind": "segmentation", "grid": 16, "steps": 20, "ignore": [0, 255]}])
    task = opened.settings.tasks[0]
    assert isinstance(task, Segmentation)
    (score,) = segmentation.segmentation(task, make_model(tmp_path, backbone=Colors()), opened).scores
    assert 0 < score.value < 0.2
    assert score.images == len(sets["test"])


def test_backbones_without_patches_and_missing_masks_are_named(sets: dict[str, Corpus], tmp_path: Path) -> None:
    opened = make_context(sets, [{"kind": "segmentation", "grid": 16}])
    with pytest.raises(UserError, match="segmentation: this backbone gives one vector an image"):
        segmentation.segmentation(opened.settings.tasks[0], make_model(tmp_path), opened)  # type: ignore[arg-type]
    opened = make_context(sets, [{"kind": "depth", "grid": 16}])
    with pytest.raises(UserError, match=r"has no depth\.png beside it"):
        depth.depth(opened.settings.tasks[0], make_model(tmp_path, backbone=Colors()), opened)  # type: ignore[arg-type]


def test_depth_is_learned_where_brightness_tells_it(tmp_path: Path) -> None:
    def corpus(name: str, first: int) -> Corpus:
        members = {}
        for number in range(first, first + 10):
            coarse = np.random.default_rng(number).uniform(1, 9, (4, 4)).astype(np.float32)
            meters = np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)).clip(0.5, 9.9)
            gray = np.repeat((meters * 25)[..., None], 3, -1).astype(np.uint8)
            stored = (meters * 1000).astype(np.uint16)
            stored[:8] = 0  # unknown
            members[f"{number:02d}"] = {"png": png(gray), "depth.png": png(stored)}
        return samples(tmp_path / name, members)

    sets = {"train": corpus("train", 0), "test": corpus("test", 50)}
    opened = make_context(
        sets, [{"kind": "depth", "grid": 16, "steps": 400, "batch": 4, "bins": 64, "learning_rate": 0.01}]
    )
    task = opened.settings.tasks[0]
    assert isinstance(task, Depth)
    error, *deltas = depth.depth(task, make_model(tmp_path, backbone=Colors()), opened).scores
    assert (error.metric, error.better, error.is_fraction) == ("RMSE, m", "lower", False)
    assert error.value < 0.8
    assert deltas[0].value > 0.8
    assert [each.value for each in deltas] == sorted(each.value for each in deltas)


def test_depth_errors_by_hand() -> None:
    truth, found = np.array([[0, 2.0], [4.0, 1.0]]), np.array([[9.0, 2.4], [5.2, 3.0]])
    error, *within = depth.depth_errors(found, truth)
    assert error == pytest.approx(np.sqrt((0.4**2 + 1.2**2 + 2**2) / 3))
    assert within == pytest.approx([1 / 3, 2 / 3, 2 / 3])  # factors 1.2, 1.3 and 3
    assert np.isnan(depth.depth_errors(found, np.zeros((2, 2)))).all()
    same = depth.scale_invariant_loss(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0]))
    assert float(same) == pytest.approx(np.sqrt(0.15) * np.log(2), rel=1e-3)


def test_masks_are_carried_through_a_video(tmp_path: Path) -> None:
    members = {}
    for name, step in (("left", 4), ("right", -4)):
        for frame in range(6):
            mask = np.zeros((64, 96), dtype=np.uint8)
            start = 32 + step * frame
            mask[16:40, start : start + 20] = 1
            mask[44:60, 90 - start : 110 - start] = 2
            image = COLORS[mask] + np.random.default_rng(frame).normal(scale=5, size=(64, 96, 3))
            members[f"{name}/{frame:05d}"] = {"jpg": _jpeg(image.clip(0, 255).astype(np.uint8)), "seg.png": png(mask)}
    corpus = samples(tmp_path, members)
    assert [len(frames) for frames in video_segmentation.group_videos(corpus).values()] == [6, 6]
    opened = make_context({"test": corpus}, [{"kind": "video_segmentation", "grid": 16}])
    task = opened.settings.tasks[0]
    assert isinstance(task, VideoSegmentation)
    both, region, boundary = video_segmentation.video_segmentation(
        task, make_model(tmp_path, backbone=Colors()), opened
    ).scores
    assert both.images == 4  # objects
    assert region.value > 0.8
    assert boundary.value > 0.8
    assert both.value == pytest.approx((region.value + boundary.value) / 2)


def test_regions_and_boundaries_by_hand() -> None:
    first, second = np.zeros((50, 50), dtype=bool), np.zeros((50, 50), dtype=bool)
    first[10:30, 10:30], second[10:30, 15:35] = True, True
    assert video_segmentation.region_similarity(first, second) == pytest.approx(300 / 500)
    assert (
        video_segmentation.region_similarity(first, first) == video_segmentation.boundary_accuracy(first, first) == 1.0
    )
    assert video_segmentation.boundary_accuracy(first, np.zeros_like(first)) == 0.0
    moved = np.zeros_like(first)
    moved[11:31, 10:30] = True
    assert video_segmentation.boundary_accuracy(first, moved) == 1.0  # one pixel, within the tolerance
    assert video_segmentation.boundary_accuracy(first, second) < 0.8


def test_points_are_found_where_the_same_color_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = np.asarray(Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((64, 64), 0))
    flipped = np.ascontiguousarray(image[:, ::-1])
    corpus = samples(tmp_path, {"a": {"png": png(image)}, "b": {"png": png(flipped)}})
    points = [[4, 4], [20, 44], [60, 12]]
    pair = {"source": "a", "target": "b", "source_points": points, "size": 40}
    mirrored = pair | {"target_points": [[64 - x, y] for x, y in points]}
    wrong = pair | {"target_points": [[(x + 32) % 64, y] for x, y in points]}
    (tmp_path / "pairs.json").write_text(json.dumps([mirrored, wrong]))
    opened = make_context(
        {"test": corpus}, [{"kind": "correspondence", "pairs": str(tmp_path / "pairs.json"), "grid": 16}]
    )
    task = opened.settings.tasks[0]
    assert isinstance(task, Correspondence)
    (score,) = correspondence.correspondence(task, make_model(tmp_path, backbone=Colors()), opened).scores
    assert score.metric == "PCK@0.1"
    assert score.value == pytest.approx(0.5)
    (tmp_path / "pairs.json").write_text(json.dumps([{"source": "a"}]))
    with pytest.raises(UserError, match="target: field required"):
        correspondence.correspondence(task, make_model(tmp_path, backbone=Colors()), opened)


def test_patches_of_one_thing_have_one_color() -> None:
    rng = np.random.default_rng(0)
    things, ground = rng.normal(3, 0.5, (60, 8)), rng.normal(-3, 0.3, (140, 8))
    colors = principal_colors(np.concatenate([things, ground])).astype(int)
    first = colors[:, 0]
    assert min(first[:60].min(), first[60:].min()) < max(first[:60].min(), first[60:].min()) - 100
    assert np.ptp(first[:60]) < 100
    assert np.ptp(first[60:]) < 100
    assert principal_colors(rng.normal(size=(50, 2))).shape == (50, 3)  # fewer dimensions than colors
    assert not principal_colors(np.ones((5, 4))).any()  # nothing tells them apart


def test_maps_are_pngs_and_nothing_that_could_run(tmp_path: Path) -> None:
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"
    corpus = samples(tmp_path, {"a": {"jpg": _jpeg(scene(0)[0]), "seg.png": script}})
    with pytest.raises(UserError, match=r"a\.seg\.png is no readable image"):
        dense_labels.read_map(corpus, 0, "seg.png")


def test_pictures_of_patches_are_pngs(sets: dict[str, Corpus]) -> None:
    data = patch_pca(Colors(), sets["test"], 4)
    assert data.startswith(b"\x89PNG")


def test_attention_of_the_class_token_is_that_of_the_reference(tmp_path: Path) -> None:
    from pretrain.models.config import VisionTransformerConfig
    from pretrain.models.vit import VisionTransformer

    for position in ("learned", "rope"):
        config = VisionTransformerConfig(
            embed_dim=32, depth=2, num_heads=2, patch_size=8, image_size=32, num_register_tokens=2, pos_embed=position
        )
        torch.manual_seed(0)
        model = VisionTransformer(config).eval()
        images = torch.randn(2, 3, 32, 48)
        seen: dict[str, torch.Tensor] = {}

        handle = model.blocks[-1].register_forward_pre_hook(lambda module, inputs, seen=seen: seen.update(x=inputs[0]))
        with torch.inference_mode():
            ours = model.get_last_self_attention(images)
            model([images])
        handle.remove()
        block = model.blocks[-1]
        length = 1 + 2 + 24
        with torch.inference_mode():
            qkv = block.attn.qkv(block.norm1(seen["x"])).unflatten(0, (2, length)).unflatten(-1, (3, 2, 16))
            query, key = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
            if position == "rope":
                from pretrain.models.rope import rotate

                rotation = model.rope(4, 6, 3)
                query, key = rotate(query, rotation), rotate(key, rotation)
            weights = (query @ key.transpose(-2, -1) / 4).softmax(-1)
        torch.testing.assert_close(ours, weights[:, :, 0, 3:].unflatten(-1, (4, 6)), atol=1e-5, rtol=1e-4)
