"""Teachers written while a training goes on, and their evaluation beside it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import pretrain
from flows.config import PipelineConfig
from infra.artifacts.artifact import find, open_artifact, verify
from pretrain.checkpoint import teacher_export
from pretrain.checkpoint.artifact import WEIGHTS, Checkpoint
from pretrain.models.vit import VisionTransformer
from tests.conftest import SyntheticCorpora
from tests.test_pretrain_training import TINY, config

FOVEA = Path(sys.executable).with_name("fovea")
RUNTIME = {"num_workers": 0, "checkpoint_every": 3, "export_teacher_every": 4}


def test_teachers_are_what_the_probe_sees_at_their_steps(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def probe(backbone: VisionTransformer, steps: int) -> dict[str, float]:
        seen[steps] = {name: value.clone() for name, value in backbone.state_dict().items()}
        return {}

    health = {"probe": {"train": synthetic.seed, "test": synthetic.test, "every": 4}}
    settings = config(synthetic.seed, tmp_path / "run", runtime=RUNTIME, collapse=health)
    trained = pretrain.run(settings, probe)
    written = teacher_export.list_exports(trained.url)
    assert [step for step, _ in written] == [4, 8]  # after the twelfth step comes the checkpoint itself
    for step, artifact in written:
        assert verify(artifact) == []
        checkpoint = Checkpoint.open(artifact.url)
        for name, value in checkpoint.backbone().state_dict().items():
            torch.testing.assert_close(value, seen[step][name], rtol=0, atol=0)
        assert any(name.startswith("dino.teacher_head.") for name in checkpoint.weights("objectives."))
    plain = pretrain.run(config(synthetic.seed, tmp_path / "plain", runtime={"num_workers": 0}))
    assert plain.id == trained.id  # how often teachers are written changes nothing else
    assert teacher_export.list_exports(plain.url) == []
    reseeded = settings.schedule.model_copy(update={"seed": 9})
    other = settings.model_copy(update={"schedule": reseeded})
    shutil.rmtree(tmp_path / "run")
    again = pretrain.run(other, probe)
    assert {teacher.manifest.config["training"] for _, teacher in teacher_export.list_exports(again.url)} == {again.id}


def test_a_killed_training_writes_the_same_teachers(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    whole = pretrain.run(config(synthetic.seed, tmp_path / "whole", runtime=RUNTIME))
    settings = config(synthetic.seed, tmp_path / "killed", runtime=RUNTIME)

    def dying(backbone: VisionTransformer, steps: int) -> dict[str, float]:
        raise KeyboardInterrupt

    probed = {"collapse": {"probe": {"train": synthetic.seed, "test": synthetic.test, "every": 6}}}
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(config(synthetic.seed, tmp_path / "killed", runtime=RUNTIME, **probed), dying)
    again = pretrain.run(settings)
    assert again.metrics["resumed_at"] > 0
    for (_, first), (_, second) in zip(
        teacher_export.list_exports(whole.url), teacher_export.list_exports(again.url), strict=True
    ):
        assert first.id == second.id
        hashes = ({file.path: file.sha256 for file in each.manifest.files} for each in (first, second))
        assert len({each[WEIGHTS] for each in hashes}) == 1


FOLLOW = {
    "tasks": [{"kind": "knn", "k": [5]}],
    "baselines": False,
    "pictures": 0,
    "bootstrap": 20,
    "poll_seconds": 0.2,
}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_running_training_is_followed(synthetic: SyntheticCorpora, tmp_path: Path, prefect_home: Path) -> None:
    """The follower starts before the training does, scores each teacher once, and ends with it."""
    out = tmp_path / "teacher"
    datasets = {"train": synthetic.seed, "test": synthetic.test}
    (tmp_path / "follow.yaml").write_text(yaml.safe_dump(FOLLOW | {"training": str(out), "datasets": datasets}))
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump(TINY | {"runtime": RUNTIME, "corpora": [synthetic.seed], "out": str(out)})
    )
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home)}
    follower = subprocess.Popen(
        [str(FOVEA), "eval-checkpoints", str(tmp_path / "follow.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        subprocess.run([str(FOVEA), "pretrain", str(tmp_path / "train.yaml")], check=True, capture_output=True)
        told, errors = follower.communicate(timeout=300)
    finally:
        if follower.poll() is None:
            os.killpg(follower.pid, signal.SIGKILL)
    assert follower.returncode == 0, errors
    comparison = open_artifact(told.split()[-1], "report")
    assert list(comparison.metrics["knn"]) == ["step 4", "step 8", "step 12"]
    reports = list((tmp_path / "teacher.reports" / "evaluate").iterdir())
    assert len(reports) == 3
    assert all(find(str(each)) is not None for each in reports)


PIPELINE = """
import sys
from prefect import flow
from flows.orchestration import pipeline_stages, stages
from flows.config import PipelineConfig
from flows.orchestration.pipeline import evaluate_beside
from flows.orchestration.pipeline_run import PipelineRun

config = PipelineConfig.model_validate_json(sys.argv[1])

@flow
def part(train: str, test: str) -> dict[str, str]:
    run = PipelineRun(config, stages.run)
    pipeline_stages._pretrain(run, {"train": train, "test": test}, [train], {}, evaluate_beside)
    return run.urls

print(part(sys.argv[2], sys.argv[3])["teachers"])
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_pipeline_follows_its_pretraining(synthetic: SyntheticCorpora, tmp_path: Path, prefect_home: Path) -> None:
    config = PipelineConfig.model_validate(
        {
            "root": str(tmp_path / "run"),
            "synthetic": {},
            "pretrain": {**TINY, "runtime": RUNTIME},
            "checkpoint_eval": FOLLOW,
        }
    )
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home), "PREFECT_LOGGING_LEVEL": "CRITICAL"}
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, config.model_dump_json(), synthetic.seed, synthetic.test],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    comparison = open_artifact(done.stdout.split()[-1], "report")
    assert list(comparison.metrics["knn"]) == ["step 4", "step 8", "step 12"]
