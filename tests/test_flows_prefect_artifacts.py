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
from flows.orchestration import prefect_artifacts
from flows.orchestration.prefect_progress import describe_progress, last_row
from infra.artifacts.artifact import open_artifact
from infra.launch.slurm_status import JobMonitor, JobStatus
from tests.conftest import SyntheticCorpora


def test_tables_hold_what_the_artifact_says(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    corpus = open_artifact(synthetic.pool, "corpus")
    assert {"what": "images", "value": corpus.metrics["images"]} in prefect_artifacts._metrics_table(corpus)
    steps = [{"kind": "exact"}]
    selection = curation.run(CurateConfig(corpus=synthetic.pool, steps=steps, out=str(tmp_path / "selection")))
    (row,) = prefect_artifacts._funnel_table(selection)
    assert row == {"step": "exact", "kept": selection.metrics["kept"], "dropped": row["dropped"]}
    assert row["kept"] + row["dropped"] == selection.metrics["images"]
    report = evaluate(
        EvaluateConfig(
            model={"kind": "pixels"},
            datasets={"train": synthetic.seed, "test": synthetic.test},
            tasks=[{"kind": "knn", "k": [3]}],
            out=str(tmp_path / "report"),
        )
    )
    (row,) = prefect_artifacts._scores_table(report)
    assert row["protocol"] == "knn"
    assert row["model"] == f"{100 * report.metrics['knn']['model']:.1f} %"


def test_pages_lead_to_the_ui_where_there_is_one(synthetic: SyntheticCorpora, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_artifact(synthetic.pool, "corpus")
    assert prefect_artifacts.page_link(corpus) == f"file://{synthetic.pool}"
    monkeypatch.setenv("FOVEA_UI", "http://fovea.example:4300/")
    assert prefect_artifacts.page_link(corpus) == f"http://fovea.example:4300/artifacts/{corpus.id}"


def test_the_last_whole_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "live_metrics.jsonl"
    assert last_row(path) is None
    path.write_text("")
    assert last_row(path) is None
    rows = [{"step": step, "loss": 3.5, "images_per_second": 1234.5} for step in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    row = last_row(path)
    assert row == rows[4]
    assert describe_progress("pretrain", row, 1000) == "pretrain: step 5 of 1,000, loss 3.5, 1,234 images/s"


def test_a_jobs_way_through_the_queue_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "infra.launch.slurm_status._describe_queue_position", lambda job, partition: f", number 2 of 5 in {partition}"
    )
    followed = JobMonitor("7")

    def told(state: str, restarts: int = 0, **fields: str) -> list[str]:
        known = {"JobState": state, "Restarts": str(restarts), "Partition": "gpu", **fields}
        return followed.new_messages(JobStatus(frozenset({state}), known))

    waits = "SLURM job 7 waits, number 2 of 5 in gpu, because of Resources, to start about 2026-01-01T00:00:00"
    assert told("PENDING", Reason="Resources", StartTime="2026-01-01T00:00:00") == [waits]
    assert told("PENDING", Reason="Resources", StartTime="2026-01-01T00:00:00") == []
    assert told("RUNNING", NodeList="n[1-2]") == ["SLURM job 7 runs on n[1-2]"]
    again = ["SLURM job 7 was queued again, 1 times so far", "SLURM job 7 waits, number 2 of 5 in gpu"]
    assert told("PENDING", 1, Reason="None", StartTime="Unknown") == again
    assert told("RUNNING", 1, NodeList="n1") == ["SLURM job 7 runs on n1"]
    assert told("FAILED", 1, ExitCode="1:0") == ["SLURM job 7 ended: failed, exit code 1:0"]
    assert not JobStatus(frozenset({"RUNNING", "COMPLETED"}), {}).ended  # of an array one goes on
    assert JobStatus(frozenset(), {}).ended
    assert JobStatus(frozenset(), {}).failed  # nobody saw how
    assert not JobStatus(frozenset({"COMPLETED"}), {}).failed


def test_a_picture_is_small_enough_for_a_database(tmp_path: Path) -> None:
    from infra.artifacts.artifact import ArtifactSpec, get_or_create

    def write(folder: Path) -> dict[str, int]:
        Image.effect_noise((3000, 2000), 80).convert("RGB").save(folder / "pca.png")
        return {}

    found = prefect_artifacts._picture(
        get_or_create(ArtifactSpec("report", "evaluate", 1, {}), str(tmp_path / "a"), write)
    )
    assert found is not None
    kind, _, data = found.partition(";base64,")
    assert kind == "data:image/jpeg"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (900, 600)
    assert len(data) < 500_000
    assert (
        prefect_artifacts._picture(
            get_or_create(ArtifactSpec("report", "report", 1, {}), str(tmp_path / "b"), lambda _: {})
        )
        is None
    )
