"""Pipeline and stages as deployments of a real Prefect server, run by a worker that knows nothing else."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.checkpoint_eval import evaluate_in_background
from flows.config import CheckpointEvalConfig, DeploySettings, PipelineConfig
from flows.orchestration import automations
from flows.orchestration.concurrency import hold_slots
from flows.orchestration.deployments import STAGES, build_prefect_yaml, remove_schedules, write
from flows.scheduled_curation import resource, run_scheduled_curation
from infra.artifacts.artifact import find
from infra.errors import UserError
from tests.conftest import SyntheticCorpora, image_folder
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
    assert {each["entrypoint"].rpartition(":")[2] for each in others} == {
        *STAGES,
        "run_scheduled_curation",
        "eval_checkpoints",
    }
    variables = first["work_pool"]["job_variables"]["env"]
    assert variables == {"A": "b", "DO_NOT_TRACK": "1", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60"}
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
    parameters = build_prefect_yaml(asked)["deployments"][0]["parameters"]["config"]
    assert parameters["sources"]["pool"].startswith("${FOVEA_DATA}/")
    assert parameters["root"] == "s3://bucket/run"
    with pytest.raises(UserError, match="root: runs/cifar10 is relative"):
        build_prefect_yaml(settings(tmp_path, pipeline=str(file)))


def test_with_a_share_the_schedule_curates_and_growth_starts_the_pipeline(tmp_path: Path) -> None:
    asked = settings(tmp_path, cron="0 3 * * 1", min_change=0.1)
    pipeline, curation, *_ = build_prefect_yaml(asked)["deployments"]
    assert "schedules" not in pipeline
    assert curation["schedules"] == [{"cron": "0 3 * * 1", "timezone": "UTC"}]
    assert curation["parameters"] == {"config": pipeline["parameters"]["config"], "min_change": 0.1}
    (trigger,) = pipeline["triggers"]
    assert trigger == {"expect": ["fovea.selection.changed"], "match": resource(str(tmp_path / "run"))}
    assert resource("a") != resource("b")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("prefect")
    with serving(folder) as found:
        asked = settings(folder, work_pool="machines")
        done = found.fovea("deploy", "--pipeline", asked.pipeline, "--work-pool", "machines", "--file", asked.file)
        assert done.returncode == 0, done.stderr
        found.start_worker("machines", folder / "worker")
        yield found


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_stage_runs_where_a_worker_is_and_its_form_tells_what_it_takes(server: Server, tmp_path: Path) -> None:
    deployment = server.asked("/deployments/name/fovea-pipeline/fovea")
    schema = deployment["parameter_openapi_schema"]["definitions"]
    assert schema["Schedule"]["properties"]["global_batch_size"]["minimum"] == 1
    image_folder(tmp_path / "images", 4)
    corpus = {"source": str(tmp_path / "images"), "out": str(tmp_path / "corpus")}
    run = server.started("ingest", {"config": corpus})
    assert server.waited(run, ENDED) == "COMPLETED"
    artifact = find(str(tmp_path / "corpus"))
    assert artifact is not None
    assert artifact.metrics["images"] == 4
    shown = {each["key"]: each for each in artifacts(server, run)}
    assert {"what": "images", "value": 4} in json.loads(shown["fovea-ingest"]["data"])
    assert f"file://{tmp_path}/corpus" in shown["fovea-ingest-page"]["data"]
    with pytest.raises(OSError, match=r"409|422"):  # refused before it is queued
        server.started("ingest", {"config": {"source": 3}})


def artifacts(server: Server, run: str) -> list[dict[str, Any]]:
    """What a run shows on the server's pages."""
    found: list[dict[str, Any]] = server.asked("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
    return found


def pipeline_runs(server: Server) -> list[dict[str, Any]]:
    asked = {"flows": {"name": {"any_": ["fovea-pipeline"]}}, "sort": "START_TIME_ASC"}
    found: list[dict[str, Any]] = server.asked("/flow_runs/filter", asked)
    return found


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_pool_that_grows_is_curated_on_and_trained_on_when_enough_has_changed(server: Server, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pool", 20)
    image_folder(tmp_path / "others", 4, classes=2, first=500)
    others = str(tmp_path / "others")
    told = {
        "root": str(tmp_path / "run"),
        "incremental": True,
        "sources": {"pool": str(folder), "test": others, "train": others},
        "deduplicate": {"steps": [{"kind": "exact"}, {"kind": "near_duplicates"}]},
    }
    file = tmp_path / "growing.yaml"
    file.write_text(yaml.safe_dump(told))
    options = (
        "--work-pool",
        "machines",
        "--name",
        "growing",
        "--min-change",
        "0.2",
        "--file",
        str(tmp_path / "prefect.yaml"),
    )
    done = server.fovea("deploy", "--pipeline", str(file), *options)
    assert done.returncode == 0, done.stderr

    def curated(expected: int) -> dict[str, Any]:
        """What was made, once the server has started as many runs of the pipeline as are expected, and no more."""
        before = len(pipeline_runs(server))
        with temporary_settings({PREFECT_API_URL: server.environment["PREFECT_API_URL"]}):
            run_scheduled_curation(PipelineConfig.model_validate(told), min_change=0.2)
        deadline = time.monotonic() + 120  # for the server to act on the event
        while len(pipeline_runs(server)) - before < expected:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        time.sleep(3)
        found = pipeline_runs(server)
        assert len(found) - before == expected
        for each in found[before:]:
            server.asked(f"/flow_runs/{each['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})
        made: dict[str, Any] = json.loads((tmp_path / "run" / ".state" / "curated.json").read_text())
        return made

    first = curated(1)  # nothing was trained on before
    selection = find(first["made"]["deduplicate"])
    assert selection is not None
    assert first["earlier"] == {}
    assert json.loads((tmp_path / "run" / ".state" / "trained.json").read_text()) == {"selection": selection.url}
    image_folder(tmp_path / "pool", 3, first=20)
    second = curated(0)  # 3 of 23 are new
    assert second["earlier"] == first["made"]
    grown = find(second["made"]["deduplicate"])
    assert grown is not None
    assert grown.manifest.inputs["previous"].id == selection.id
    assert grown.metrics["images"] == 23
    image_folder(tmp_path / "pool", 5, first=23)
    curated(1)  # 8 of 28


@pytest.mark.multiprocess
def test_slots_of_gpus_are_waited_for_and_given_back(server: Server) -> None:
    with temporary_settings({PREFECT_API_URL: server.environment["PREFECT_API_URL"]}):
        with (
            pytest.raises(UserError, match="has no concurrency limit gpus; make it: prefect gcl"),
            hold_slots("gpus", 1),
        ):
            pass
        server.asked("/v2/concurrency_limits/", {"name": "gpus", "limit": 2})
        with pytest.raises(UserError, match="gpus has 2 slots, the training has 3 ranks"), hold_slots("gpus", 3):
            pass
        order: list[str] = []

        def other() -> None:
            with temporary_settings({PREFECT_API_URL: server.environment["PREFECT_API_URL"]}), hold_slots("gpus", 1):
                order.append("other")

        with hold_slots("gpus", 2):
            waiting = threading.Thread(target=other)
            waiting.start()
            time.sleep(3)
            order.append("this")
        waiting.join(120)
        assert order == ["this", "other"]


@pytest.mark.multiprocess
def test_a_crashed_run_goes_on_once_for_each_attempt_that_began(server: Server, tmp_path: Path) -> None:
    asked = settings(tmp_path, cron="0 3 * * 1")
    options = ("--work-pool", "empty", "--name", "idle", "--file", asked.file)
    done = server.fovea("deploy", "--pipeline", asked.pipeline, *options, "--cron", "0 3 * * 1")
    assert done.returncode == 0, done.stderr
    assert server.asked("/deployments/name/fovea-pipeline/idle")["schedules"]
    run = server.started("fovea-pipeline", {}, "idle")

    def into(*states: str) -> None:
        for each in states:
            server.asked(f"/flow_runs/{run}/set_state", {"state": {"type": each}, "force": True})

    into("PENDING", "CRASHED")
    time.sleep(5)
    assert server.state(run) == "CRASHED"  # its process never came up
    into("RUNNING", "CRASHED")
    assert server.waited(run, {"SCHEDULED"}, 30) == "SCHEDULED"
    into("PENDING", "CRASHED")
    time.sleep(5)
    assert server.state(run) == "CRASHED"
    into("RUNNING", "CRASHED")
    assert server.waited(run, {"SCHEDULED"}, 30) == "SCHEDULED"
    into("CANCELLED")
    there = {PREFECT_API_URL: server.environment["PREFECT_API_URL"]}
    with temporary_settings(there), get_client(sync_client=True) as client:
        remove_schedules(settings(tmp_path, name="idle"), client)  # as the next `fovea deploy` without --cron does
    assert server.asked("/deployments/name/fovea-pipeline/idle")["schedules"] == []


@pytest.mark.slow
@pytest.mark.multiprocess
def test_failures_are_told_to_a_block(server: Server, tmp_path: Path) -> None:
    there = {PREFECT_API_URL: server.environment["PREFECT_API_URL"]}
    with heard() as (url, told):
        with temporary_settings(there), get_client(sync_client=True) as client:
            with pytest.raises(UserError, match="notification_block: the server has no block custom-webhook/nobody"):
                automations.apply(settings(tmp_path, notification_block="custom-webhook/nobody"), client)
            body = {"subject": "{{subject}}", "body": "{{body}}"}
            CustomWebhookNotificationBlock(name="ops", url=url, json_data=body).save("ops")
            automations.apply(settings(tmp_path, notification_block="custom-webhook/ops"), client)
            names = {each.name for each in client.read_automations()}
        assert "fovea: notify-failures" in names
        run = server.started("ingest", {"config": {"source": str(tmp_path / "nowhere"), "out": str(tmp_path / "out")}})
        assert server.waited(run, ENDED) == "FAILED"
        deadline = time.monotonic() + 60
        while not told:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        with temporary_settings(there), get_client(sync_client=True) as client:
            automations.apply(settings(tmp_path), client)  # nobody is to be told any more
            assert {each.name for each in client.read_automations()} == names - {"fovea: notify-failures"}
    (message,) = told
    assert message["subject"] == "ingest Failed"
    assert "nowhere: not found" in message["body"]


@pytest.mark.multiprocess
def test_teachers_are_scored_by_the_worker_of_a_deployment(server: Server, tmp_path: Path) -> None:
    asked = CheckpointEvalConfig(training=str(tmp_path / "teacher"), datasets={"train": "a", "test": "b"})
    there = {PREFECT_API_URL: server.environment["PREFECT_API_URL"]}
    with (
        temporary_settings(there),
        evaluate_in_background(asked, tmp_path / "job", "fovea-eval-checkpoints/fovea") as found,
    ):
        pass
    assert found == []  # nobody waits for it
    (run,) = server.asked("/flow_runs/filter", {"flows": {"name": {"any_": ["fovea-eval-checkpoints"]}}})
    assert CheckpointEvalConfig.model_validate(run["parameters"]["config"]) == asked
    server.asked(f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CANCELLED"}, "force": True})


@contextmanager
def heard() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A web hook, and what is posted to it."""
    told: list[dict[str, str]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=hook.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{hook.server_port}/", told
    hook.shutdown()
    thread.join()
    hook.server_close()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_cancelled_training_saves_its_state_and_lets_go(
    server: Server, synthetic: SyntheticCorpora, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    changes: dict[str, Any] = {
        "sharding": {"backend": "torch"},
        "runtime": {"num_workers": 0, "checkpoint_every": 10_000},
    }
    long = config(synthetic.seed, out, **changes, schedule={"steps": 20_000, "global_batch_size": 8})
    run = server.started("pretrain", {"config": long.settings()})
    log = out.with_name("run.job")
    deadline = time.monotonic() + 180
    told = log / "live_metrics.jsonl"
    while not told.exists() or len(told.read_text().splitlines()) < 20:  # steps
        assert time.monotonic() < deadline
        assert server.state(run) not in ENDED
        time.sleep(0.5)
    server.asked(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert server.waited(run, ENDED) == "CANCELLED"
    assert not [each for each in psutil.process_iter(["cmdline"]) if str(log) in (each.info["cmdline"] or [])]
    (saved,) = (out / "checkpoints").glob("*/train_state.json")
    assert int(saved.parent.name.removeprefix("step-")) > 0
