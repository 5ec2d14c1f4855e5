"""Started work outlives a changed setting: every stage that resumes refuses by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import curation.curate
import curation.embed
import curation.ingest.ingest
import distill.train.distill
import pretrain.train
from curation.config import CurateConfig, EmbedConfig, IngestConfig
from distill.config import DistillConfig
from eval import evaluate
from eval.config import EvaluateConfig
from infra.artifacts.artifact import Artifact, ArtifactSpec, find, get_or_create
from infra.artifacts.staging import RECORD
from infra.config import Output
from infra.errors import UserError
from infra.storage import filesystem
from pretrain.config import PretrainConfig
from tests.conftest import SyntheticCorpora
from tests.test_curation_ingest import shards
from tests.test_distill import STUDENT
from tests.test_infra_artifacts import PLAN
from tests.test_pretrain_training import TINY


class Killed(Exception):
    pass


def kill(*_: object, **__: object) -> None:
    raise Killed


@dataclass(frozen=True)
class Stage:
    """A stage, how to stop it near its end, and a setting that decides its result."""

    run: Callable[[Any], Artifact]
    config: Callable[[Mapping[str, Any]], Output]
    stopped_at: str
    """What it calls once it has work to resume from."""
    changed: Mapping[str, Any]
    named: str
    """How a refusal names the change."""


SHORT = {"schedule": {"steps": 6, "global_batch_size": 8}, "sharding": {"backend": "torch"}}
RUNTIME = {"num_workers": 0, "checkpoint_every": 2}


def pretraining(synthetic: SyntheticCorpora, **changes: Any) -> dict[str, Any]:
    return {**TINY, **SHORT, "runtime": RUNTIME, "corpora": [synthetic.seed], **changes}


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path, synthetic: SyntheticCorpora) -> Stage:
    def of(schema: type[Output], /, **base: Any) -> Callable[[Mapping[str, Any]], Output]:
        return lambda changes: schema.model_validate({**base, "out": str(tmp_path / "out"), **changes})

    def pixels(name: str, corpus: str) -> str:
        return curation.embed.embed(EmbedConfig(corpus=corpus, out=str(tmp_path / name))).url

    match request.param:
        case "ingest":
            config = of(IngestConfig, source=str(shards(tmp_path / "source", 3, ".tar.gz")), workers=1)
            stopped_at = "curation.ingest.ingest.IndexWriter.finish"
            return Stage(curation.ingest.ingest.ingest, config, stopped_at, {"min_side": 9}, "min_side 8, now 9")
        case "embed":
            config = of(EmbedConfig, corpus=synthetic.pool)
            changed = {"backbone": {"kind": "pixels", "side": 12}}
            return Stage(curation.embed.embed, config, "infra.corpus.embeddings.write_keys", changed, "side 16, now 12")
        case "curate":
            step = {"kind": "near_duplicates", "allow_chains": True}
            steps = [{"kind": "exact"}, {**step, "threshold": 0.9}]
            vectors = pixels("vectors", synthetic.pool)
            config = of(CurateConfig, corpus=synthetic.pool, embeddings=vectors, steps=steps)
            changed = {"steps": [steps[0], {**step, "threshold": 0.8}]}
            named = r"steps\.1\.threshold 0\.9, now 0\.8"
            return Stage(curation.curate.curate, config, "infra.corpus.selection.write", changed, named)
        case "pretrain":
            config = of(PretrainConfig, **pretraining(synthetic))
            changed = {"schedule": {"steps": 8, "global_batch_size": 8}}
            named = r"schedule\.steps 6, now 8"
            return Stage(pretrain.train.pretrain, config, "pretrain.checkpoint.artifact.write", changed, named)
        case "distill":
            teacher = pretrain.train.pretrain(PretrainConfig(**pretraining(synthetic, out=str(tmp_path / "teacher"))))
            base = {**STUDENT, **SHORT, "runtime": RUNTIME, "corpora": [synthetic.seed]}
            config = of(DistillConfig, **base, teacher_checkpoint=teacher.url)
            changed = {"optimizer": {"base_lr": 0.5}}
            named = r"optimizer\.base_lr 0\.02, now 0\.5"
            return Stage(distill.train.distill.distill, config, "pretrain.checkpoint.artifact.write", changed, named)
        case _:
            datasets = {"train": synthetic.seed, "test": synthetic.test}
            config = of(EvaluateConfig, model={"kind": "pixels"}, datasets=datasets, tasks=[{"kind": "knn"}])
            changed = {"tasks": [{"kind": "knn", "k": [5]}]}
            return Stage(evaluate.evaluate, config, "eval.report.evaluation_page.write", changed, r"tasks\.0\.k")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


STAGES = ["ingest", "embed", "curate", "pretrain", "distill", "evaluate"]


@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_a_changed_setting_never_removes_started_work(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(stage.stopped_at, kill)
        with pytest.raises(Killed):
            stage.run(stage.config({}))
    before = contents(out)
    refusal = f"holds unfinished work of other settings.*{stage.named}.*another --out, or discard it with --restart"
    with pytest.raises(UserError, match=refusal):
        stage.run(stage.config(stage.changed))
    assert contents(out) == before
    assert find(str(out)) is None
    resumed = stage.run(stage.config({}))
    assert resumed.id != find_id(stage, tmp_path)


def find_id(stage: Stage, tmp_path: Path) -> str:
    """Id of the artifact with the changed setting, made elsewhere."""
    return stage.run(stage.config({**stage.changed, "out": str(tmp_path / "other")})).id


@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_started_work_is_discarded_when_asked(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stage.stopped_at, kill)
        with pytest.raises(Killed):
            stage.run(stage.config({}))
    made = stage.run(stage.config({**stage.changed, "restart": True}))
    assert made.id == find_id(stage, tmp_path)
    again = stage.run(stage.config({**stage.changed, "restart": True}))
    assert again.manifest == made.manifest  # a finished artifact is not made again


def test_what_may_change_resumes(synthetic: SyntheticCorpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards, launcher settings and runtime are no part of a checkpoint's identity."""
    base = pretraining(synthetic, out=str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.checkpoint.artifact.write", kill)
        with pytest.raises(Killed):
            pretrain.train.pretrain(PretrainConfig(**base))
    changes = {"guards": {"loss_spike_threshold": 5.0}, "collapse": {"every": 3}, "launch": {"max_restarts": 2}}
    changes |= {"runtime": {"num_workers": 1, "checkpoint_every": 1}}
    resumed = pretrain.train.pretrain(PretrainConfig(**{**base, **changes}))
    assert resumed.metrics["resumed_at"] == 6


def test_another_stage_in_the_place_is_named(
    synthetic: SyntheticCorpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pretrain.checkpoint.artifact.write", kill)
        with pytest.raises(Killed):
            pretrain.train.pretrain(PretrainConfig(**pretraining(synthetic, out=str(tmp_path / "out"))))
    with pytest.raises(UserError, match=r"unfinished work of other settings \(stage pretrain, now embed\)"):
        curation.embed.embed(EmbedConfig(corpus=synthetic.seed, out=str(tmp_path / "out")))


def test_remote_work_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of a training lie at the remote URL before its manifest does."""
    monkeypatch.setenv("FOVEA_CACHE", str(tmp_path))
    url = "memory://unfinished/run"
    state = filesystem.join(url, "checkpoints/step-3/train_state.json")

    def start(directory: Path) -> dict[str, int]:
        filesystem.write_atomic(state, b"{}")
        raise Killed

    with pytest.raises(Killed):
        get_or_create(PLAN, url, start, ["checkpoints/*/train_state.json"])
    other = ArtifactSpec("report", "test", 1, {"b": 2, "a": [1.5, None]}, PLAN.inputs)
    with pytest.raises(UserError, match=r"unfinished work of other settings \(b 1, now 2\)"):
        get_or_create(other, url, kill, ["checkpoints/*/train_state.json"])
    assert filesystem.exists(state)
    made = get_or_create(
        other, url, lambda directory: {"n": int(filesystem.exists(state))}, ["checkpoints/*/train_state.json"], True
    )
    assert made.metrics == {"n": 0}
    assert not filesystem.exists(filesystem.join(url, RECORD))


def test_debris_that_nothing_resumes_from_is_replaced(tmp_path: Path) -> None:
    """A stage that failed before it had work to keep is repeated with other settings, unasked."""

    def fail(directory: Path) -> dict[str, int]:
        (directory / "half").write_text("written")
        raise Killed

    with pytest.raises(Killed):
        get_or_create(PLAN, str(tmp_path / "a"), fail, ["state"])
    other = ArtifactSpec("report", "test", 1, {"b": 2}, PLAN.inputs)
    made = get_or_create(other, str(tmp_path / "a"), lambda directory: {"n": len(list(directory.iterdir()))}, ["state"])
    assert made.metrics == {"n": 1}  # the record


def test_work_of_an_unknown_record_is_debris(tmp_path: Path) -> None:
    """A kill while work was being discarded leaves a record that is cut short."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / RECORD).write_text('{"id": "12')
    (tmp_path / "a" / "state").write_text("half")
    made = get_or_create(PLAN, str(tmp_path / "a"), lambda directory: {"n": len(list(directory.iterdir()))}, ["state"])
    assert made.metrics == {"n": 1}
