"""Everything at once: Prefect's server on PostgreSQL, a worker, SLURM on two nodes, S3. `make test-cluster` runs it.

The pipeline is run twice through the API. The second time a rank of the pretraining is killed, then the worker with the
run's process: the same backbone is published.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from s3fs import S3FileSystem

from curation.config import IngestConfig
from curation.ingest.ingest import ingest
from flows.config import PipelineConfig
from flows.orchestration.prefect_progress import last_row
from infra.artifacts.artifact import open_artifact, verify
from infra.storage import filesystem
from tests import postgres, s3_server, slurm_cluster
from tests.conftest import SyntheticCorpora
from tests.prefect_server import ENDED, Server, serving
from tests.test_flows import pipeline, tells_places

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(s3_server.missing()), reason=f"no S3 server here: {s3_server.missing()}"),
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=slurm_cluster.missing() or ""),
    pytest.mark.skipif(postgres.missing() is not None, reason=postgres.missing() or ""),
]
_log = logging.getLogger(__name__)
ROOT = "s3://fovea"
STEPS, SAVED = 400, 20
POOL = "cluster"


@dataclass(frozen=True)
class Cluster:
    prefect: Server
    slurm: slurm_cluster.Slurm
    folder: Path

    def until(self, what: str, condition: Callable[[], Any], seconds: float = 300) -> Any:
        """What a condition says once it holds."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"waited {seconds} s: {what}"
            time.sleep(0.2)
        _log.info("%s", what)
        return found

    def ranks(self) -> list[psutil.Process]:
        """Processes of the pretraining."""
        found = []
        for each in psutil.process_iter(["cmdline", "environ"]):
            command = each.info["cmdline"] or []
            if command[1:3] == ["-m", "flows.pretraining"] and "SLURM_STEP_ID" in (each.info["environ"] or {}):
                found.append(each)
        return found

    def logs(self, run: str) -> str:
        """What a run and its stages have told the server."""
        runs = self.prefect.asked("/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}})
        ids = [run, *(each["id"] for each in runs)]
        told = self.prefect.asked(
            "/logs/filter", {"logs": {"flow_run_id": {"any_": ids}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        )
        return "\n".join(each["message"] for each in told)


@pytest.fixture(scope="module")
def cluster(synthetic: SyntheticCorpora, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("whole")
    with (
        s3_server.serving(folder / "s3") as s3,
        slurm_cluster.slurm_cluster(folder / "slurm") as slurm,
        postgres.postgres(folder / "postgres") as database,
        pytest.MonkeyPatch.context() as patch,
    ):
        variables = {
            "AWS_ENDPOINT_URL": s3.endpoint,
            "AWS_ACCESS_KEY_ID": s3.access_key,
            "AWS_SECRET_ACCESS_KEY": s3.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "SLURM_CONF": slurm.environment["SLURM_CONF"],
        }
        for name, value in variables.items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        _upload(synthetic)
        (folder / "prefect").mkdir()
        with serving(folder / "prefect", database, **variables) as prefect:
            file = folder / "pipeline.yaml"
            file.write_text(yaml.safe_dump(settings(f"{ROOT}/whole")))
            options = ("--work-pool", POOL, "--heartbeat-seconds", "30", "--file", str(folder / "prefect.yaml"))
            done = prefect.fovea("deploy", "--pipeline", str(file), *options)
            assert done.returncode == 0, done.stderr
            prefect.start_worker(POOL, folder / "worker")
            yield Cluster(prefect, slurm, folder)


def _upload(synthetic: SyntheticCorpora) -> None:
    files, _ = filesystem.connect(ROOT)
    files.mkdir("fovea")
    for role in ("pool", "seed", "test"):
        files.put(str(synthetic.folder / role), f"fovea/images/{role}", recursive=True)


def settings(root: str) -> dict[str, Any]:
    """The pipeline of the tests, its images in the bucket and its trainings on two nodes."""
    found: dict[str, Any] = pipeline(Path("unused"))
    del found["synthetic"]
    images = {role: f"{ROOT}/images/{role}" for role in ("pool", "seed", "test")}
    found |= {"root": root, "sources": {**images, "train": images["seed"]}}
    for stage, steps in (("pretrain", STEPS), ("distill", 20)):
        found[stage] = {
            **found[stage],
            "launcher": "slurm",
            "launch": {"nnodes": 2, "nproc_per_node": 1, "max_restarts": 2},
            "sharding": {"zero_stage": 2},
            "schedule": {"steps": steps, "global_batch_size": 16},
            "runtime": {"num_workers": 0, "checkpoint_every": SAVED, "micro_batch_size": 8},
        }
    PipelineConfig.model_validate(found)
    return found


def published(root: str) -> dict[str, dict[str, str]]:
    """Hashes of the files of the published backbones, but for those that tell places and times."""
    artifacts = json.loads(filesystem.read_bytes(f"{root}/summary.json"))["artifacts"]
    found = {}
    for stage, each in artifacts.items():
        artifact = open_artifact(each["url"], "backbone") if stage.startswith("publish") else None
        if artifact is not None:
            assert verify(artifact) == []
            found[stage] = {file.path: file.sha256 for file in artifact.manifest.files if not tells_places(file.path)}
            found[stage]["id"] = artifact.id
    return found


def test_a_pipeline_whose_training_and_worker_are_killed_publishes_the_same(cluster: Cluster) -> None:
    prefect = cluster.prefect
    whole = prefect.started("fovea-pipeline", {})
    assert prefect.waited(whole, ENDED, 900) == "COMPLETED", cluster.logs(whole)
    _log.info("the uninterrupted run is done")
    for line in ("SLURM job", "runs on n[1-2]", "ended: completed"):
        assert line in cluster.logs(whole)

    root = f"{ROOT}/interrupted"
    run = prefect.started("fovea-pipeline", {"config": settings(root)})
    cluster.until("the pretraining has saved a state", lambda: _saved(root) >= SAVED)
    first = cluster.ranks()
    assert len(first) == 2
    first[1].kill()
    _log.info("a rank of the pretraining is killed")
    cluster.until(
        "others have taken its place", lambda: {each.pid for each in cluster.ranks()} - {e.pid for e in first}
    )
    assert "started again, 1 of at most 2 times" in cluster.logs(run)
    prefect.kill_worker()
    _log.info("the worker and the run's process are killed")
    assert prefect.state(run) == "RUNNING"  # nobody has noticed
    cluster.until("the server has noticed", lambda: prefect.asked(f"/flow_runs/{run}")["state_name"] == "AwaitingRetry")
    prefect.start_worker(POOL, cluster.folder / "another")
    assert prefect.waited(run, ENDED, 900) == "COMPLETED", cluster.logs(run)
    for line in cluster.logs(run).splitlines():
        if "SLURM" in line or "started again" in line:
            _log.info("the run told: %s", line.partition("; see the logs")[0])
    assert prefect.asked(f"/flow_runs/{run}")["run_count"] == 2
    assert published(root) == published(f"{ROOT}/whole")
    assert set(published(root)) == {"publish-small", "publish-coarse"}


def test_a_cancelled_run_lets_go_of_its_job(cluster: Cluster) -> None:
    prefect, out = cluster.prefect, f"{ROOT}/cancelled"
    corpus = ingest(IngestConfig(source=f"{ROOT}/images/seed", out=f"{ROOT}/corpora/seed"))
    long = {**settings(ROOT)["pretrain"], "schedule": {"steps": 100_000, "global_batch_size": 16}}
    long["runtime"] = {"num_workers": 0, "checkpoint_every": 50_000}
    run = prefect.started("pretrain", {"config": {**long, "corpora": [corpus.url], "out": f"{out}/pretrain/run"}})
    ranks = cluster.until("both ranks are there", lambda: cluster.ranks() if len(cluster.ranks()) == 2 else None)
    (folder,) = {Path(each.cmdline()[-1]) for each in ranks}
    cluster.until("steps are made", lambda: (last_row(folder / "live_metrics.jsonl") or {"step": 0})["step"] > 20)
    prefect.asked(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    assert prefect.waited(run, ENDED) == "CANCELLED"
    assert cluster.ranks() == []
    assert cluster.slurm.run("squeue", "--noheader") == ""
    assert "JobState=CANCELLED" in cluster.slurm.run("scontrol", "show", "job", (folder / "slurm.id").read_text())
    assert _saved(out) > 20  # before it let go


def _saved(root: str) -> int:
    """The last step that the pretraining has saved."""
    files, path = filesystem.connect(root)
    files.invalidate_cache()
    return max(
        (
            int(each.split("/")[-2].removeprefix("step-"))
            for each in files.find(f"{path}/pretrain")
            if each.endswith("train_state.json")
        ),
        default=0,
    )
