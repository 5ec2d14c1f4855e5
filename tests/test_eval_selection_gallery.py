"""The pages that tell of a curation: every step's numbers and galleries, and one image's story."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from eval.config import ReportConfig
from eval.report.explain import explain, write_page
from eval.report.run_page import PAGE, build_report
from eval.report.selection_gallery import SelectionGallery
from flows.cli.main import main
from infra.artifacts.artifact import Artifact
from infra.errors import UserError
from tests.pools import curated, planted, pool

STEPS: list[dict[str, Any]] = [
    {"kind": "exact"},
    {"kind": "near_duplicates", "threshold": 0.8},
    {"kind": "decontaminate", "threshold": 0.8},
    {"kind": "semdedup", "clusters": 3, "eps": 0.1},
    {"kind": "retrieve", "k": 10},
    {"kind": "balance", "levels": [20, 5], "target": 40},
]


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("selection")
    target = pool(folder, planted(8, 300, 16), "<b>k")
    test, seed = pool(folder, planted(8, 20, 16), "t"), pool(folder, planted(9, 30, 16), "s")
    return curated(folder, target, *STEPS, eval_embeddings=[test.embeddings], seed_embeddings=seed.embeddings)[0]


def ledger(selection: Artifact) -> list[dict[str, Any]]:
    from infra.corpus.selection import Selection

    return Selection.open(selection.url).ledger.to_pylist()


def test_the_page_tells_of_every_step(selection: Artifact, tmp_path: Path) -> None:
    config = ReportConfig(artifacts={"curate": selection.url}, gallery=6, out=str(tmp_path / "page"))
    html = (Path(build_report(config).url) / PAGE).read_text()
    for step in selection.metrics["steps"]:
        assert f"<td>{step['step'].replace('_', ' ')}</td>" in html
        assert f'<td class="number">{step["kept"]:,}</td>' in html
    for title in ("Near-duplicates", "Worst components", "Borderline pairs", "Leaks", "Retrieved", "Not retrieved"):
        assert f"<h3>{title}" in html
    assert html.count('<div class="chart">') == 4  # two curves, a histogram, evenness
    assert "<b>k" not in html
    assert not re.search(r'(src|href)="(?!data:|#)', html)


def test_galleries_show_what_the_ledger_says(selection: Artifact) -> None:
    rows = ledger(selection)
    shown = {gallery.title: gallery for gallery in SelectionGallery(selection, 1000).galleries()}
    winners = {row["matched_key"] for row in rows if row["reason"] == "near_duplicate"}
    assert len(shown["Near-duplicates"].groups) == len(winners)
    leaks = [row for row in rows if row["reason"] == "leak"]
    assert [group[1].caption for group in shown["Leaks from eval_embeddings_0"].groups] == [
        f"{row['score']:.3f}" for row in sorted(leaks, key=lambda row: -row["score"])
    ]
    (borderline,) = (gallery for title, gallery in shown.items() if title.startswith("Borderline leaks"))
    for group in borderline.groups:
        if group[1].caption != "0.800":  # rounded
            assert group[1].mark == ("dropped" if float(group[1].caption) >= 0.8 else "kept")


def test_clusters_of_the_seed_and_bounds_of_scores_are_shown(tmp_path: Path) -> None:
    vectors = planted(8, 200, 16)
    rows = [{"json": f'{{"beauty": {number}}}'.encode()} for number in range(200)]
    target, seed = pool(tmp_path, vectors, rows=rows), pool(tmp_path, vectors[:40], "s")
    steps = [
        {"kind": "score", "scorer": {"kind": "field", "field": "beauty"}, "name": "beauty", "min": 20, "max": 180},
        {"kind": "retrieve_clusters", "clusters": 8, "min_seeds": 4, "quota": 12},
    ]
    selection, verdicts = curated(tmp_path, target, *steps, seed_embeddings=seed.embeddings)
    shown = {gallery.title: gallery for gallery in SelectionGallery(selection, 6).galleries()}
    marks = [(group[0].caption, group[0].mark) for group in shown["Borderline by beauty"].groups]
    assert marks == [
        (f"{each}.000", "kept" if 20 <= each <= 180 else "dropped") for each in (19, 20, 21, 179, 180, 181)
    ]
    for group in shown["Clusters of the seed"].groups:
        assert group[0].mark == "reference"
        assert {picture.mark for picture in group[2:]} <= {"kept", "dropped"}
    page = build_report(ReportConfig(artifacts={"curate": selection.url}, gallery=6, out=str(tmp_path / "page")))
    html = (Path(page.url) / PAGE).read_text()
    assert "score: images dropped at each score" in html
    assert sum(not row["keep"] and row["reason"] == "high_beauty" for row in verdicts) == 19


def test_why_follows_an_image_to_what_is_kept_or_compared(selection: Artifact, tmp_path: Path) -> None:
    rows = {row["key"]: row for row in ledger(selection)}
    for row in rows.values():
        story = explain(selection.url, row["key"])
        assert story.trail[0].key == row["key"]
        if row["reason"] == "near_duplicate":
            assert story.trail[1].key == row["matched_key"]
            same = [key for key, other in rows.items() if other["duplicate_group"] == row["duplicate_group"]]
            assert story.count == len(same) > 1
        if row["reason"] == "leak":
            assert "an image of" in story.trail[1].text
            assert story.trail[1].picture.mark == "reference"
    lost = next(key for key, row in rows.items() if row["reason"] == "near_duplicate")
    write_page(explain(selection.url, lost), tmp_path / "explain.html")
    with pytest.raises(UserError, match="give --page a file in a folder that can be written"):
        write_page(explain(selection.url, lost), tmp_path / "none" / "explain.html")
    html = (tmp_path / "explain.html").read_text()
    assert "<b>k" not in html
    assert html.count("data:image/webp") >= 3
    with pytest.raises(UserError, match="nobody: no image of"):
        explain(selection.url, "nobody")


def test_the_command_tells_it_in_words(selection: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    lost = next(row for row in ledger(selection) if row["reason"] == "near_duplicate")
    with pytest.raises(SystemExit, match="0"):
        main(["explain", lost["key"], "--selection", selection.url])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{lost['key']}: dropped by the step near_duplicates: near duplicate, {lost['score']:.4f}")
    assert second.startswith(f"  {lost['matched_key']}: ")
