"""What a training tells while it runs: speed, trackers, collapse, a probe."""

from __future__ import annotations

import json
import math
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrain
from flows import pretraining
from infra.errors import UserError
from pretrain.config import Collapse
from pretrain.models.vit import VisionTransformer
from pretrain.monitoring import collapse, collapse_metrics, trackers
from pretrain.monitoring.throughput import ThroughputMeter, describe_step
from pretrain.planning import hardware
from tests.conftest import SyntheticCorpora
from tests.daemons import free_ports
from tests.ranks import run_ranks
from tests.test_pretrain_training import config, losses

PLAIN = {"sharding": {"backend": "torch"}, "runtime": {"num_workers": 0, "micro_batch_size": 8}}


def test_rankme_counts_dimensions() -> None:
    torch.manual_seed(0)
    assert float(collapse_metrics.rankme(torch.eye(16))) == pytest.approx(16, rel=1e-3)
    assert float(collapse_metrics.rankme(torch.ones(64, 16))) == pytest.approx(1, rel=1e-2)
    values = np.linalg.svd(features := torch.randn(50, 12).numpy(), compute_uv=False)
    shares = values / values.sum()
    assert float(collapse_metrics.rankme(torch.from_numpy(features))) == pytest.approx(
        math.exp(-(shares * np.log(shares)).sum()), rel=1e-3
    )


def test_usage_and_divergence_of_prototypes() -> None:
    even, one = torch.eye(8), torch.eye(8)[:1].expand(8, -1)
    logits = 100 * even
    found = collapse_metrics.measure_prototypes("dino", even, logits, 1.0)
    assert float(found["collapse_dino_usage"]) == pytest.approx(1)
    assert float(found["collapse_dino_kl"]) == pytest.approx(0, abs=1e-5)
    assert float(collapse_metrics.measure_prototypes("dino", one, logits, 1.0)["collapse_dino_usage"]) == pytest.approx(
        0
    )
    uniform = torch.full((4, 8), 1 / 8)
    expected = torch.nn.functional.kl_div(torch.zeros(4, 8).log_softmax(-1), torch.eye(8)[:4], reduction="batchmean")
    told = collapse_metrics.measure_prototypes("ibot", torch.eye(8)[:4], torch.zeros(4, 8), 0.1)["collapse_ibot_kl"]
    assert float(told) == pytest.approx(float(expected))
    assert float(
        collapse_metrics.measure_prototypes("ibot", uniform, torch.zeros(4, 8), 0.1)["collapse_ibot_kl"]
    ) == pytest.approx(0, abs=1e-6)


def test_alarms_name_what_is_low() -> None:
    row = {
        "loss": 0.1,
        "collapse_rank": 1.2,
        "collapse_dino_usage": 0.5,
        "collapse_ibot_kl": 0.0,
        "collapse_dino_kl": 2.0,
    }
    assert collapse.find_alarms(row, Collapse()) == ["rank 1.2 is below 1.5", "ibot_kl 0 is below 0.0001"]
    well, other = {"collapse_rank": 9.0}, {"loss": 1.0}
    assert collapse.count_consecutive_alarms([row, well, row, other, row, other], Collapse()) == 2
    assert collapse.count_consecutive_alarms([row, well, other], Collapse()) == 0


@pytest.mark.multiprocess
def test_a_collapsed_training_stops_if_it_should(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    """Without KoLeo and centering that works, one direction is left; here thresholds nobody can reach stand for it."""
    strict = {"every": 2, "min_rank": 1000.0, "stop_after": 3}
    with pytest.raises(UserError, match=r"collapsed at step 5: rank [\d.]+ is below 1000; lower optimizer.base_lr"):
        pretrain.run(config(synthetic.seed, tmp_path / "run", **PLAIN, collapse=strict))
    pretrain.run(config(synthetic.seed, tmp_path / "warned", **PLAIN, collapse={**strict, "stop_after": None}))
    rows = losses(tmp_path / "warned")
    looked = [row["step"] for row in rows if "collapse_rank" in row]
    assert looked == [1, 3, 5, 7, 9, 11]
    assert {"collapse_dino_usage", "collapse_dino_kl", "collapse_ibot_usage", "collapse_ibot_kl"} < set(rows[1])
    assert 0.5 < rows[-1]["collapse_dino_usage"] <= 1
    plain = losses(tmp_path / "warned")
    pretrain.run(config(synthetic.seed, tmp_path / "blind", **PLAIN, collapse={"every": 0}))
    for blind, seen in zip(losses(tmp_path / "blind"), plain, strict=True):  # looking changes nothing
        assert blind == {name: value for name, value in seen.items() if not name.startswith("collapse_")}


@pytest.mark.multiprocess
def test_a_probe_sees_the_teacher_of_its_step(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    asked = {"probe": {"train": synthetic.seed, "test": synthetic.test, "every": 4, "k": 5}}
    seen: list[tuple[int, VisionTransformer]] = []

    def probe(backbone: VisionTransformer, steps: int) -> Mapping[str, float]:
        seen.append((steps, backbone))
        return {"steps": float(steps)}

    pretrain.run(config(synthetic.seed, tmp_path / "run", **PLAIN, collapse=asked), probe)
    rows = losses(tmp_path / "run")
    assert [row.get("probe_steps") for row in rows if "probe_steps" in row] == [4, 8, 12]
    last = pretrain.checkpoint.artifact.Checkpoint.open(str(tmp_path / "run")).backbone().state_dict()
    assert seen[-1][0] == 12
    assert all(torch.equal(value, last[name]) for name, value in seen[-1][1].state_dict().items())
    assert not torch.equal(seen[0][1].norm.weight, last["norm.weight"])
    pretraining.run(config(synthetic.seed, tmp_path / "knn", **PLAIN, collapse=asked))
    scores = [row["probe_knn"] for row in losses(tmp_path / "knn") if "probe_knn" in row]
    assert len(scores) == 3
    assert all(0 < score <= 1 for score in scores)
    others = [{name: row[name] for name in row if not name.startswith("probe_")} for row in rows]
    untouched = [{name: row[name] for name in row if not name.startswith("probe_")} for row in losses(tmp_path / "knn")]
    assert others == untouched


def test_speed_is_of_the_last_steps() -> None:
    now = [0.0]
    meter = ThroughputMeter(100, torch.device("cpu"), lambda: (2e9, 1e12), clock=lambda: now[0])
    for _ in range(60):
        now[0] += 0.5
        facts = meter.update()
    assert facts["images_per_second"] == pytest.approx(200)
    assert facts["mfu"] == pytest.approx(200 * 2e9 / 1e12)
    for _ in range(50):
        now[0] += 1.0
        facts = meter.update()
    assert facts["images_per_second"] == pytest.approx(100)
    line = describe_step({"loss": 1.5, "dino_global": 0.25, "koleo": 1.0}, facts)
    assert line.startswith("loss 1.500, 100 images/s, MFU 20 %, ")
    assert line.endswith(" GB; dino_global 0.250, koleo 1.000")


def test_the_work_and_the_peak_of_a_task_are_found(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    from pretrain.checkpoint.spec import checkpoint_spec
    from pretrain.monitoring.reporter import TrainJob
    from pretrain.train import build_module, build_view_dataset

    settings = config(synthetic.seed, tmp_path / "run", **PLAIN)
    dataset = build_view_dataset(settings.corpora, settings)
    spec = checkpoint_spec(settings)
    task = TrainJob("pretrain", settings, [], dataset, lambda: build_module(settings), tmp_path / "run", "", spec)
    flops, peak = task.flops_and_peak(torch.device("cpu"))
    assert 1e6 < flops < 1e9
    assert peak == pytest.approx(hardware.peak_flops(torch.device("cpu"), "fp32"), rel=0.9)


@pytest.mark.multiprocess
def test_trackers_get_every_step(synthetic: SyntheticCorpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tracker's own reader finds the losses of metrics.jsonl."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_TRACKING_URI": ""}.items():
        monkeypatch.setenv(name, value)
    runtime = {**PLAIN["runtime"], "trackers": ["tensorboard", "wandb", "mlflow"]}
    pretrain.run(config(synthetic.seed, tmp_path / "run", **{**PLAIN, "runtime": runtime}))
    expected = [row["loss"] for row in losses(tmp_path / "run")]
    job = tmp_path / "run.job"
    lines = [json.loads(line) for line in (job / "live_metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == expected
    assert {"images_per_second", "memory_gb"} < set(lines[-1])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(expected)
    from mlflow.tracking import MlflowClient

    run = (job / "mlflow.run").read_text()
    history = MlflowClient(f"sqlite:///{job / 'mlflow.db'}").get_metric_history(run, "loss")
    assert [each.value for each in sorted(history, key=lambda each: each.step)] == pytest.approx(expected)
    (written,) = (job / "wandb").glob("offline-run-*/*.wandb")
    assert written.stat().st_size > 1000


def test_prometheus_reads_the_last_step_while_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    (port,) = free_ports(1)
    monkeypatch.setenv("FOVEA_METRICS_PORT", str(port))
    lines, tracker = trackers.build(["prometheus"], tmp_path, "abc", 0)
    for step in range(3):
        tracker.log(step, {"loss": 2.0 - step, "collapse_ibot/usage": 0.5})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = {each.name: each for each in text_string_to_metric_families(answer.read().decode())}
    told = {name: families[name].samples[0] for name in ("fovea_step", "fovea_loss", "fovea_collapse_ibot_usage")}
    assert [each.value for each in told.values()] == [2, 0, 0.5]
    assert {each.labels["run"] for each in told.values()} == {"abc"}
    with pytest.raises(UserError, match=f"127.0.0.1:{port}: Address already in use; give another port"):
        trackers.build(["prometheus"], tmp_path, "abc", 0)
    tracker.close()
    trackers.build(["prometheus"], tmp_path, "abc", 0)[1].close()  # the port is free again
    lines.close()


def test_a_tracker_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'fovea\[trackers\]'"):
        trackers.build(["wandb"], tmp_path, "run", 0)


def test_health_of_nothing_is_left_out_and_of_no_number_is_none() -> None:
    nothing = collapse_metrics.measure_prototypes("ibot", torch.zeros(0, 8), torch.zeros(0, 8), 0.1)
    broken = {collapse.RANK: collapse_metrics.rankme(torch.full((4, 8), torch.nan))}
    told = {name: float(value) for name, value in (nothing | broken).items()}
    assert collapse.drop_unmeasured(told | {"loss": 1.0}) == {"loss": 1.0}
    few = collapse_metrics.measure_prototypes("dino", torch.full((4, 64), 1 / 64), torch.zeros(4, 64), 0.1)
    assert float(few["collapse_dino_usage"]) == 1


def test_the_peak_is_that_of_the_gpu_by_its_whole_name() -> None:
    names = {
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200": "h200",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "NVIDIA A10G": "a10g",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
    }
    for device, name in names.items():
        assert hardware.find_gpu_name(device) == hardware.GPUS[name], device
    for device in ("NVIDIA L40", "NVIDIA H100 NVL", "Tesla T4"):
        assert hardware.find_gpu_name(device) is None


def test_a_tracker_that_fails_is_given_up(
    synthetic: SyntheticCorpora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Server:
        def log(self, step: int, values: Mapping[str, float]) -> None:
            if step == 2:
                raise ConnectionError("the server is gone")

        def close(self) -> None: ...

    monkeypatch.setattr(trackers, "build", lambda *_: [Server()])
    pretrain.run(config(synthetic.seed, tmp_path / "run", **PLAIN))
    assert [record.message for record in caplog.records if "the server is gone" in record.message] == [
        "pretrain: Server gets no more telemetry: the server is gone"
    ]
    assert len(losses(tmp_path / "run")) == 12


def test_progress_lines_of_a_killed_attempt_are_cut(tmp_path: Path) -> None:
    first = trackers.build([], tmp_path, "run", 0)[0]
    for step in range(5):
        first.log(step, {"loss": 1.0})
    with (tmp_path / "live_metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    (again,) = trackers.build([], tmp_path, "run", 3)
    again.log(3, {"loss": 2.0})
    steps = [json.loads(line)["step"] for line in (tmp_path / "live_metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"launch.job_dir: .*choose another"):
        trackers.build([], tmp_path / "file", "run", 0)


@pytest.mark.multiprocess
def test_two_ranks_count_their_work_while_they_train(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    """The first rank alone runs dry, and exchanges nothing with the other while it does."""
    changes = {
        "schedule": {"steps": 8, "global_batch_size": 16},
        "runtime": {"num_workers": 0},
        "collapse": {"every": 2},
    }
    settings = config(synthetic.seed, tmp_path / "run", **changes, sharding={"zero_stage": 3})
    script = tmp_path / "counts.py"
    script.write_text(
        "from infra.launch.job import module_main\nfrom pretrain import run\n"
        "from pretrain.config import PretrainConfig\nfrom pretrain.monitoring import throughput\n"
        "throughput._WARM_UP_SECONDS = 0\nmodule_main(PretrainConfig, run)\n"
    )
    assert run_ranks(script, settings, tmp_path / "job").returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "run.job" / "live_metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["mfu"] > 0
    plain = config(synthetic.seed, tmp_path / "plain", **changes, sharding={"zero_stage": 3})
    assert run_ranks("pretrain", plain, tmp_path / "job2").returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
