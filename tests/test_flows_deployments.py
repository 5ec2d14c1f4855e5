"""Pipeline and stages as deployments of a real Prefect server, run by a worker that knows nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from flows.config import DeploySettings
from flows.deployments import STAGES, content, write
from infra.artifacts import find
from infra.errors import UserError
from tests.conftest import Embedded, image_folder
from tests.prefect_server import ENDED, Server, serving
from tests.test_flows import pipeline
from tests.test_pretrain_training import config


def settings(tmp_path: Path, **changes: Any) -> DeploySettings:
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(pipeline(tmp_path / "run")))
    return DeploySettings.model_validate({"pipeline": str(file), "file": str(tmp_path / "prefect.yaml"), **changes})


def test_what_is_deployed_stands_in_a_file(tmp_path: Path) -> None:
    asked = settings(tmp_path, cron="0 3 * * 1", tags=["weekly"], job_variables={"env": {"A": "b"}})
    told = yaml.safe_load(write(asked).read_text())
    first, *others = told["deployments"]
    assert first["parameters"]["config"] == yaml.safe_load((tmp_path / "pipeline.yaml").read_text())
    assert first["schedules"] == [{"cron": "0 3 * * 1", "timezone": "UTC"}]
    assert first["concurrency_limit"] == 1
    assert {each["entrypoint"].rpartition(":")[2] for each in others} == {*STAGES, "follow"}
    assert all(each["tags"] == ["fovea", "weekly"] for each in told["deployments"])
    assert not any("schedules" in each for each in others)
    write(asked)  # its own file may be written again
    (tmp_path / "prefect.yaml").write_text("deployments: []")
    with pytest.raises(UserError, match="is not of fovea deploy"):
        write(asked)


def test_variables_are_the_workers_and_roots_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEA_DATA", "/here")
    file = Path(__file__).parents[1] / "flows" / "pipelines" / "cifar10.yaml"
    asked = settings(tmp_path, pipeline=str(file), root="s3://bucket/run")
    parameters = content(asked)["deployments"][0]["parameters"]["config"]
    assert parameters["sources"]["pool"].startswith("${FOVEA_DATA}/")
    assert parameters["root"] == "s3://bucket/run"
    with pytest.raises(UserError, match="root: runs/cifar10 is relative"):
        content(settings(tmp_path, pipeline=str(file)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("prefect")
    with serving(folder) as found:
        asked = settings(folder, pool="machines")
        done = found.fovea("deploy", "--pipeline", asked.pipeline, "--pool", "machines", "--file", asked.file)
        assert done.returncode == 0, done.stderr
        found.start_worker("machines", folder / "worker")
        yield found


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_stage_runs_where_a_worker_is_and_its_form_tells_what_it_takes(server: Server, tmp_path: Path) -> None:
    deployment = server.asked("/deployments/name/fovea-pipeline/fovea")
    schema = deployment["parameter_openapi_schema"]["definitions"]
    assert schema["Schedule"]["properties"]["batch"]["minimum"] == 1
    image_folder(tmp_path / "images", 4)
    corpus = {"source": str(tmp_path / "images"), "out": str(tmp_path / "corpus")}
    run = server.started("ingest", {"config": corpus})
    assert server.waited(run, ENDED) == "COMPLETED"
    artifact = find(str(tmp_path / "corpus"))
    assert artifact is not None
    assert artifact.metrics["images"] == 4
    with pytest.raises(OSError, match=r"409|422"):  # refused before it is queued
        server.started("ingest", {"config": {"source": 3}})


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_cancelled_training_saves_its_state_and_lets_go(server: Server, embedded: Embedded, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes: dict[str, Any] = {"sharding": {"engine": "torch"}, "runtime": {"workers": 0, "checkpoint_every": 10_000}}
    long = config(embedded.seed, out, **changes, schedule={"steps": 20_000, "batch": 8})
    run = server.started("pretrain", {"config": long.settings()})
    log = out.with_name("run.job")
    deadline = time.monotonic() + 180
    told = log / "progress.jsonl"
    while not told.exists() or len(told.read_text().splitlines()) < 20:  # steps
        assert time.monotonic() < deadline
        assert server.state(run) not in ENDED
        time.sleep(0.5)
    server.asked(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert server.waited(run, ENDED) == "CANCELLED"
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(log) in (each.info["cmdline"] or [])]
    (saved,) = (out / "steps").glob("*/tally.json")
    assert int(saved.parent.name) > 0
