"""Evaluation against independent computations, and the page that shows it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t, ttest_rel
from sklearn.neighbors import KNeighborsClassifier

from eval import knn, linear
from eval.compare import compare
from eval.config import CompareConfig, ReportConfig
from eval.gallery import Picture
from eval.page import render
from eval.rendering import PAGE
from eval.scores import accuracy
from infra.artifacts import Artifact, Plan, produce
from infra.errors import UserError
from infra.lineage import Ancestor


def unit(seed: int, n: int, dim: int = 6) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 5))
def test_knn_is_the_weighted_vote_of_scikit_learn(seed: int, k: int, classes: int) -> None:
    bank, queries = unit(seed, 40), unit(seed + 1, 25)
    labels = np.random.default_rng(seed).integers(0, classes, 40)
    voters = KNeighborsClassifier(
        n_neighbors=k,
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07 - 1 / 0.07),
    ).fit(bank.astype(np.float64), labels)
    ours = knn.predict(bank, labels, queries, classes, k, 0.07)
    shares = voters.predict_proba(queries.astype(np.float64))
    best_two = np.sort(shares, axis=1)[:, -2:]
    clear = best_two[:, -1] - best_two[:, 0] > 1e-4 if shares.shape[1] > 1 else np.ones(25, dtype=bool)
    np.testing.assert_array_equal(ours[clear], voters.classes_[shares.argmax(1)][clear])


def test_the_nearest_neighbour_of_a_bank_image_is_itself() -> None:
    bank, labels = unit(0, 60), np.random.default_rng(0).integers(0, 7, 60)
    np.testing.assert_array_equal(knn.predict(bank, labels, bank, 7, 1, 0.07), labels)


def test_the_probe_learns_what_is_linear_and_nothing_from_noise() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(600, 8)).astype(np.float32)
    labels = (features[:, 0] + features[:, 1] > 0).astype(np.int64)
    found = linear.predict(features[:400], labels[:400], features[400:], [0.01, 1.0, 100.0], 0.2, 0)
    assert (found == labels[400:]).mean() > 0.95
    noise = linear.predict(features[:400], rng.integers(0, 2, 400), features[400:], [0.01, 1.0], 0.2, 0)
    assert 0.3 < (noise == labels[400:]).mean() < 0.7


def test_the_probe_never_looks_at_the_test_set_to_choose() -> None:
    features, labels = unit(0, 100), np.random.default_rng(1).integers(0, 3, 100)
    first = linear.predict(features[:80], labels[:80], features[80:], [0.1, 10.0], 0.25, 0)
    second = linear.predict(features[:80], labels[:80], np.repeat(features[80:], 2, axis=0), [0.1, 10.0], 0.25, 0)
    np.testing.assert_array_equal(first, second[::2])


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        score = accuracy("knn", "model", rng.random(300) < 0.4, 400, trial)
        assert score.low <= score.value <= score.high
        covered += score.low <= 0.4 <= score.high
    assert 0.88 < covered / 200 <= 1.0


def test_an_interval_has_the_width_of_theory() -> None:
    score = accuracy("knn", "model", np.arange(900) < 270, 20_000, 0)
    assert score.high - score.low == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 900), rel=0.1)


def test_the_page_escapes_what_came_from_the_web() -> None:
    evil = "<script>alert(1)</script>"
    config = ReportConfig(title=evil, artifacts={}, out="x")
    ancestor = Ancestor(evil, "corpus", "a" * 64, "u", {evil: "b" * 64}, {"k": evil}, 1)

    class Group:
        title = evil
        note = evil
        groups = ((Picture("data:image/webp;base64,", evil, "kept"),),)

    sections = {"funnel": [], "galleries": [Group], "curves": [], "scores": [], "steps": []}
    html = render(config, sections, [ancestor], {})
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def scored(folder: Path, name: str, values: list[float]) -> list[Artifact]:
    """Reports of evaluations that came to these accuracies."""
    return [
        produce(
            Plan("report", "evaluate", 1, {"name": name, "number": number}),
            str(folder / f"{name.strip('<i>')}-{number}"),
            lambda directory, value=value: {"knn": {"model": value, "pixels": 0.1}},
        )
        for number, value in enumerate(values)
    ]


def test_groups_are_compared_report_by_report(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(0.5, 0.05, 6)
    second = first + rng.normal(0.02, 0.01, 6)
    groups = {"raw": first, "<i>curated": second, "one": first[:1]}
    urls = {name: [each.url for each in scored(tmp_path, name, values.tolist())] for name, values in groups.items()}
    artifact = compare(CompareConfig(groups=urls, out=str(tmp_path / "page")))
    rows = {row["subject"]: row for row in artifact.read_json("report.json")["rows"]}
    assert artifact.metrics["knn"]["raw"] == pytest.approx(first.mean())
    gain = ttest_rel(second, first).confidence_interval(0.95)
    assert (rows["<i>curated"]["gain_low"], rows["<i>curated"]["gain_high"]) == pytest.approx(tuple(gain))
    mean = t.interval(0.95, 5, first.mean(), first.std(ddof=1) / np.sqrt(6))
    assert (rows["raw"]["low"], rows["raw"]["high"]) == pytest.approx(mean)
    assert rows["one"]["low"] is rows["one"]["gain_high"] is None
    html = artifact.read_bytes(PAGE).decode()
    assert "<i>curated" not in html
    assert f"{100 * (second - first).mean():+.2f}" in html
    bare = produce(Plan("report", "x", 1, {}), str(tmp_path / "bare"), lambda directory: {"linear": {"model": 0.1}})
    with pytest.raises(UserError, match="has no score of a model by knn"):
        compare(CompareConfig(groups={**urls, "bare": [bare.url]}, out=str(tmp_path / "x")))
    with pytest.raises(UserError, match="no report here"):
        compare(CompareConfig(groups={"raw": [str(tmp_path / "nowhere")]}, out=str(tmp_path / "x")))
