"""Retrieval, copy detection and measures without labels, against brute force and other libraries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torchmetrics.functional.retrieval import retrieval_average_precision

import pretrain
from eval.protocols import representation, retrieval
from eval.protocols.config import CopyDetection, Representation, Retrieval
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from pretrain.backbones.config import CheckpointBackboneConfig
from tests.conftest import SyntheticCorpora, encode_image, picture
from tests.eval_contexts import Colors, make_context, make_model, png, samples
from tests.test_pretrain_training import config


def test_average_precision_by_trapezoids() -> None:
    """The revisited protocol's differs from the plain one by half a step of precision at each answer."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores, right = rng.random(30), rng.random(30) < 0.3
        if not right.any():
            continue
        order = np.argsort(-scores)
        places = np.flatnonzero(right[order])
        plain = float(retrieval_average_precision(torch.from_numpy(scores), torch.from_numpy(right)))
        before = [1.0 if place == 0 else right[order][:place].sum() / place for place in places]
        after = [(i + 1) / (place + 1) for i, place in enumerate(places)]
        assert np.mean(after) == pytest.approx(plain)
        assert retrieval.revisited_precision(places) == pytest.approx((np.mean(before) + plain) / 2)
    assert retrieval.revisited_precision(np.arange(5)) == 1.0


def test_easy_hard_and_junk_count_as_the_protocol_says(tmp_path: Path) -> None:
    shades = {"q": 200, "easy": 195, "junk": 198, "hard": 150, "far": 20}
    images = {name: np.full((32, 32, 3), [value, 90, 40], dtype=np.uint8) for name, value in shades.items()}
    images["q"][:, 16:] = 0  # cut away by the box
    queries = samples(tmp_path / "q", {"q": {"png": png(images["q"])}})
    searched = samples(tmp_path / "r", {name: {"png": png(images[name])} for name in shades if name != "q"})
    truth = {"q": {"easy": ["easy"], "hard": ["hard"], "junk": ["junk"], "box": [0, 0, 16, 32]}}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    task = Retrieval(ground_truth=str(tmp_path / "truth.json"))
    opened = make_context({"test": searched, "queries": queries}, [task.model_dump()])
    tested = make_model(tmp_path, backbone=Colors())
    values = {each.metric: each.value for each in retrieval.retrieval(task, tested, opened).scores}
    assert values == {"mAP, medium": 1.0, "mAP, hard": 1.0, "mAP, easy": 1.0}
    truth["q"] |= {"easy": ["far"], "junk": []}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    values = {each.metric: each.value for each in retrieval.retrieval(task, tested, opened).scores}
    assert values["mAP, easy"] < 1.0
    (tmp_path / "truth.json").write_text(json.dumps({"q": {"easy": ["nobody"]}}))
    with pytest.raises(UserError, match="nobody: no image of the dataset"):
        retrieval.retrieval(task, tested, opened)


def test_micro_precision_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores, right = rng.uniform(-1, 1, 200), rng.random(200) < 0.2
    missing = 7  # right pairs that were never ranked: as if behind all others
    everything = np.append(scores, np.full(missing, -2.0)), np.append(right, np.ones(missing, dtype=bool))
    found = retrieval.micro_precision(scores, right, int(right.sum()) + missing)
    order = np.argsort(-scores)
    by_hand = [(right[order][: i + 1].mean()) for i in np.flatnonzero(right[order])]
    assert found == pytest.approx(np.sum(by_hand) / (right.sum() + missing), abs=1e-6)
    assert found <= average_precision_score(everything[1], everything[0])
    assert retrieval.recall_at_precision(np.array([3.0, 2, 1]), np.array([True, False, True]), 2, 0.9) == 0.5


def test_copies_are_found_among_others(tmp_path: Path) -> None:
    references = samples(tmp_path / "r", {f"r{i}": {"png": encode_image(picture(i))} for i in range(12)})
    copies = {f"q{i}": {"jpg": encode_image(picture(i).resize((60, 48)), "JPEG", quality=60)} for i in range(4)}
    strangers = {f"s{i}": {"png": encode_image(picture(100 + i))} for i in range(4)}
    queries = samples(tmp_path / "q", copies | strangers)
    (tmp_path / "truth.json").write_text(json.dumps({f"q{i}": [f"r{i}"] for i in range(4)}))
    task = CopyDetection(ground_truth=str(tmp_path / "truth.json"), num_candidates=3)
    opened = make_context({"test": references, "queries": queries}, [task.model_dump()])
    precision, recall = retrieval.copy_detection(task, make_model(tmp_path), opened).scores
    assert (precision.metric, precision.value) == ("µAP", pytest.approx(1.0))
    assert recall.value == 1.0


def test_lidar_by_its_definition() -> None:
    rng = np.random.default_rng(0)
    views = rng.normal(size=(30, 1, 6)) * [4, 3, 2, 1, 1, 1] + 0.3 * rng.normal(size=(30, 8, 6))
    means = views.mean(1)
    within = np.mean([np.cov(each.T) for each in views], axis=0) + 1e-4 * np.eye(6)
    between = np.cov(means.T)
    values, directions = np.linalg.eigh(within)
    root = directions @ np.diag(values**-0.5) @ directions.T
    spectrum = np.linalg.eigvalsh(root @ between @ root)
    shares = spectrum / spectrum.sum()
    assert representation.lidar(views) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)


def test_alpha_is_the_slope_of_a_power_law() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(4000, 64)))[0] * np.sqrt(4000)
    basis -= basis.mean(0)
    vectors = basis * np.arange(1, 65) ** (-0.75)  # eigenvalues fall as i ** -1.5
    assert representation.alpha_req(vectors) == pytest.approx(1.5, abs=0.05)
    assert representation.alpha_req(np.ones((10, 4))) == float("inf")


def test_health_of_a_trained_teacher_tells_of_its_prototypes(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    trained = pretrain.run(config(synthetic.seed, tmp_path / "teacher", schedule={"steps": 2, "global_batch_size": 8}))
    opened = make_context({"test": Corpus.open(synthetic.test)}, [{"kind": "representation", "images": 40, "views": 3}])
    task = opened.settings.tasks[0]
    assert isinstance(task, Representation)
    model = CheckpointBackboneConfig(url=trained.url)
    found = {
        each.metric: each for each in representation.representation(task, make_model(tmp_path, model), opened).scores
    }
    assert set(found) == {"RankMe", "LiDAR", "alpha-ReQ", "outlying patch tokens", "prototype usage"}
    assert 1 <= found["RankMe"].value <= 32
    assert 0 < found["prototype usage"].value <= 1
    before = {each.metric for each in representation.representation(task, make_model(tmp_path / "b"), opened).scores}
    assert before == {"RankMe", "LiDAR", "alpha-ReQ"}
