"""What the server's pages are given of an artifact, and how a training is told of."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

import curation
from curation.config import CurateConfig
from eval import run as evaluate
from eval.config import EvaluateConfig
from flows import showing
from flows.watching import last_row, sentence
from infra.artifacts import open_artifact
from infra.launch.slurm_jobs import Followed, Look
from tests.conftest import Embedded


def test_tables_hold_what_the_artifact_says(embedded: Embedded, tmp_path: Path) -> None:
    corpus = open_artifact(embedded.pool, "corpus")
    assert {"what": "images", "value": corpus.metrics["images"]} in showing._numbers(corpus)
    steps = [{"kind": "exact"}]
    selection = curation.run(CurateConfig(corpus=embedded.pool, steps=steps, out=str(tmp_path / "selection")))
    (row,) = showing._funnel(selection)
    assert row == {"step": "exact", "kept": selection.metrics["kept"], "dropped": row["dropped"]}
    assert row["kept"] + row["dropped"] == selection.metrics["images"]
    report = evaluate(
        EvaluateConfig(
            model={"kind": "pixels"},
            datasets={"train": embedded.seed, "test": embedded.test},
            tasks=[{"kind": "knn", "k": [3]}],
            out=str(tmp_path / "report"),
        )
    )
    (row,) = showing._scores(report)
    assert row["protocol"] == "knn"
    assert row["model"] == f"{100 * report.metrics['knn']['model']:.1f} %"


def test_pages_lead_to_the_ui_where_there_is_one(embedded: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_artifact(embedded.pool, "corpus")
    assert showing.page_of(corpus) == f"file://{embedded.pool}"
    monkeypatch.setenv("FOVEA_UI", "http://fovea.example:4300/")
    assert showing.page_of(corpus) == f"http://fovea.example:4300/artifacts/{corpus.id}"


def test_the_last_whole_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    assert last_row(path) is None
    path.write_text("")
    assert last_row(path) is None
    rows = [{"step": step, "loss": 3.5, "images_per_second": 1234.5} for step in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    row = last_row(path)
    assert row == rows[4]
    assert sentence("pretrain", row, 1000) == "pretrain: step 5 of 1,000, loss 3.5, 1,234 images/s"


def test_a_jobs_way_through_the_queue_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.launch.slurm_jobs._place", lambda job, partition: f", number 2 of 5 in {partition}")
    followed = Followed("7")

    def told(state: str, restarts: int = 0, **fields: str) -> list[str]:
        known = {"JobState": state, "Restarts": str(restarts), "Partition": "gpu", **fields}
        return followed.news(Look(frozenset({state}), known))

    waits = "SLURM job 7 waits, number 2 of 5 in gpu, because of Resources, to start about 2026-01-01T00:00:00"
    assert told("PENDING", Reason="Resources", StartTime="2026-01-01T00:00:00") == [waits]
    assert told("PENDING", Reason="Resources", StartTime="2026-01-01T00:00:00") == []
    assert told("RUNNING", NodeList="n[1-2]") == ["SLURM job 7 runs on n[1-2]"]
    again = ["SLURM job 7 was queued again, 1 times so far", "SLURM job 7 waits, number 2 of 5 in gpu"]
    assert told("PENDING", 1, Reason="None", StartTime="Unknown") == again
    assert told("RUNNING", 1, NodeList="n1") == ["SLURM job 7 runs on n1"]
    assert told("FAILED", 1, ExitCode="1:0") == ["SLURM job 7 ended: failed, exit code 1:0"]
    assert not Look(frozenset({"RUNNING", "COMPLETED"}), {}).ended  # of an array one goes on
    assert Look(frozenset(), {}).ended
    assert Look(frozenset(), {}).failed  # nobody saw how
    assert not Look(frozenset({"COMPLETED"}), {}).failed


def test_a_picture_is_small_enough_for_a_database(tmp_path: Path) -> None:
    from infra.artifacts import ArtifactSpec, produce

    def write(folder: Path) -> dict[str, int]:
        Image.effect_noise((3000, 2000), 80).convert("RGB").save(folder / "pca.png")
        return {}

    found = showing._picture(produce(ArtifactSpec("report", "evaluate", 1, {}), str(tmp_path / "a"), write))
    assert found is not None
    kind, _, data = found.partition(";base64,")
    assert kind == "data:image/jpeg"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (900, 600)
    assert len(data) < 500_000
    assert showing._picture(produce(ArtifactSpec("report", "report", 1, {}), str(tmp_path / "b"), lambda _: {})) is None
