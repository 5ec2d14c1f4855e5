"""Evaluation against independent computations, and the page that shows it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t, ttest_rel

from eval.compare import compare, paired_interval
from eval.config import CompareConfig, ReportConfig
from eval.report.gallery import Picture
from eval.report.run_page import render
from eval.report.templating import PAGE
from eval.stats.scores import Scorer
from infra.artifacts.artifact import Artifact, ArtifactSpec, get_or_create
from infra.artifacts.lineage import Ancestor
from infra.errors import UserError

BY = Scorer("knn", "model", 400, 0)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        score = replace(BY, seed=trial).score_accuracy("accuracy", rng.random(300) < 0.4)
        assert score.low is not None
        assert score.high is not None
        assert score.low <= score.value <= score.high
        covered += score.low <= 0.4 <= score.high
    assert 0.88 < covered / 200 <= 1.0


def test_an_interval_has_the_width_of_theory() -> None:
    score = replace(BY, resamples=20_000).score_accuracy("accuracy", np.arange(900) < 270)
    assert score.low is not None
    assert score.high is not None
    assert score.high - score.low == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 900), rel=0.1)


def test_any_function_of_the_images_has_an_interval() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(2, 1, 400)
    leaked = np.arange(400) < 100
    score = replace(BY, resamples=2000).score_images(
        "meters", 400, lambda rows: float(values[rows].mean()), leaked, is_fraction=False, better="lower"
    )
    assert score.value == pytest.approx(values.mean())
    assert (score.low, score.high) == pytest.approx(t.interval(0.95, 399, values.mean(), values.std() / 20), abs=0.02)
    assert score.without_leaks == pytest.approx(values[100:].mean())
    assert (score.leaked, score.better, score.is_fraction) == (100, "lower", False)


def test_the_page_escapes_what_came_from_the_web() -> None:
    evil = "<script>alert(1)</script>"
    config = ReportConfig(title=evil, artifacts={}, out="x")
    ancestor = Ancestor(evil, "corpus", "a" * 64, "u", {evil: "b" * 64}, {"k": evil}, 1)

    class Group:
        title = evil
        note = evil
        groups = ((Picture("data:image/webp;base64,", evil, "kept"),),)

    empty = {"funnel": [], "curves": [], "scores": [], "steps": [], "bars": []}
    sections = {**empty, "galleries": [Group], "headline": [(evil, evil)]}
    html = render(config, sections, [ancestor], {})
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def scored(folder: Path, name: str, values: list[float]) -> list[Artifact]:
    """Reports of evaluations that came to these accuracies."""

    def write(directory: Path, value: float) -> dict[str, dict[str, float]]:
        rows = [
            BY.score_value("accuracy", value, 100, is_fraction=True),
            BY.score_value("accuracy at another k", 0.5, 100, is_fraction=True),
            replace(BY, model="pixels").score_value("accuracy", 0.1, 100, is_fraction=True),
        ]
        (directory / "report.json").write_text(json.dumps({"rows": [row.as_dict() for row in rows], "left_out": {}}))
        return {"knn": {"model": value, "pixels": 0.1}}

    return [
        get_or_create(
            ArtifactSpec("report", "evaluate", 1, {"name": name, "number": number}),
            str(folder / f"{name.strip('<i>')}-{number}"),
            lambda directory, value=value: write(directory, value),
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
    rows = {row["model"]: row for row in artifact.read_json("report.json")["rows"]}
    assert artifact.metrics["knn"]["raw"] == pytest.approx(first.mean())
    gain = ttest_rel(second, first).confidence_interval(0.95)
    assert (rows["<i>curated"]["gain_low"], rows["<i>curated"]["gain_high"]) == pytest.approx(tuple(gain))
    mean = t.interval(0.95, 5, first.mean(), first.std(ddof=1) / np.sqrt(6))
    assert (rows["raw"]["low"], rows["raw"]["high"]) == pytest.approx(mean)
    assert rows["one"]["low"] is rows["one"]["gain_high"] is None
    assert {row["metric"] for row in rows.values()} == {"accuracy"}
    html = artifact.read_bytes(PAGE).decode()
    assert "<i>curated" not in html
    assert f"{100 * (second - first).mean():+.2f}" in html
    bare = get_or_create(
        ArtifactSpec("report", "x", 1, {}), str(tmp_path / "bare"), lambda directory: {"linear": {"model": 0.1}}
    )
    with pytest.raises(UserError, match="has no scores"):
        compare(CompareConfig(groups={**urls, "bare": [bare.url]}, out=str(tmp_path / "x")))
    with pytest.raises(UserError, match="no report here"):
        compare(CompareConfig(groups={"raw": [str(tmp_path / "nowhere")]}, out=str(tmp_path / "x")))


def test_two_reports_are_compared_image_by_image() -> None:
    """McNemar's: only images that one of the two has right and the other wrong count."""
    rng = np.random.default_rng(0)
    first = rng.random(2000) < 0.6
    second = np.where(rng.random(2000) < 0.1, ~first, first)
    low, high = paired_interval(second, first)
    difference = second.astype(float) - first
    half = 1.96 * difference.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((difference.mean() - half, difference.mean() + half), abs=2e-3)
    assert paired_interval(first, first) == (0.0, 0.0)
