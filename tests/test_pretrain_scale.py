"""Several ranks, every ZeRO stage, and what goes wrong: a sharded training is the plain one, and nothing harms it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infra.artifacts.artifact import open_artifact
from infra.errors import EXIT_PREEMPTED
from infra.launch.job import Job
from pretrain.checkpoint.artifact import WEIGHTS, Checkpoint
from pretrain.config import PretrainConfig
from pretrain.monitoring.watchdog import EXIT_HANG
from tests.conftest import SyntheticCorpora
from tests.ranks import run_module, run_ranks
from tests.test_pretrain_training import TINY, config, losses

pytestmark = pytest.mark.multiprocess

# Without what each rank draws or sees by itself: masks, stochastic depth, KoLeo.
ALIKE = {
    "objectives": TINY["objectives"][:1],
    "model": {**TINY["model"], "drop_path_rate": 0.0},
    "views": {**TINY["views"], "mask_probability": 0.0},
    "teacher": {"momentum": [0.9999, 0.9999], "temperature": [0.06, 0.07]},
    "optimizer": {**TINY["optimizer"], "grad_clip": 0.1, "grad_clip_scope": "parts"},
    "runtime": {"num_workers": 0, "checkpoint_every": 5},
}
STEPS = 20
STAGES: list[dict[str, object]] = [{"zero_stage": stage} for stage in range(4)]
OFFLOADED: list[dict[str, object]] = [
    *({"zero_stage": stage, "offload_optimizer": "cpu"} for stage in (1, 2)),
    {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
]


def _words(sharding: dict[str, object]) -> str:
    return " ".join(f"{name} {value}" for name, value in sharding.items())


@pytest.fixture(scope="module")
def plain(synthetic: SyntheticCorpora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process of plain torch in float32."""
    out = tmp_path_factory.mktemp("plain") / "run"
    schedule = {"steps": STEPS, "global_batch_size": 16}
    run_module("pretrain", config(synthetic.seed, out, **ALIKE, schedule=schedule, sharding={"backend": "torch"}))
    return out


@pytest.mark.parametrize("sharding", [*STAGES, *OFFLOADED], ids=_words)
def test_two_ranks_of_every_stage_are_one_plain_process(
    synthetic: SyntheticCorpora, plain: Path, tmp_path: Path, sharding: dict[str, object]
) -> None:
    """Losses of 20 steps to 1 %, the teacher to a tenth of what it moved at a momentum of 0.9999."""
    changes = {**ALIKE, "schedule": {"steps": STEPS, "global_batch_size": 16}, "sharding": sharding}
    sharded = config(synthetic.seed, tmp_path / "run", **changes)
    assert run_ranks("pretrain", sharded, tmp_path / "job").returncode == 0
    for ours, single in zip(losses(tmp_path / "run"), losses(plain), strict=True):
        assert ours["loss"] == pytest.approx(single["loss"], rel=1e-2)
        assert ours["gradient_norm"] == pytest.approx(single["gradient_norm"], rel=5e-2)
        assert single["gradient_norm"] > 0.2  # so that clipping at 0.1 tells
    first, second = load_file(tmp_path / "run" / WEIGHTS), load_file(plain / WEIGHTS)
    assert first.keys() == second.keys()
    before = Checkpoint.open(str(plain)).untrained_backbone().state_dict()
    moved = 0.0
    for name, start in before.items():
        ours, single = (weights[f"teacher.{name}"] for weights in (first, second))
        torch.testing.assert_close(ours, single, rtol=0, atol=1e-6)
        moved = max(moved, float((single - start).abs().max()))
    assert moved > 1e-5  # the tolerance would notice a teacher that stood still


@pytest.mark.parametrize(("begun", "ended"), [(OFFLOADED[-1], STAGES[1]), (STAGES[3], OFFLOADED[1])], ids=_words)
def test_a_training_goes_on_under_another_engine_and_world(
    synthetic: SyntheticCorpora, tmp_path: Path, begun: dict[str, object], ended: dict[str, object]
) -> None:
    """Two ranks begin, one under other settings ends it; every sample comes in its order, none twice, none missed."""
    settings = config(synthetic.seed, tmp_path / "run", **ALIKE, schedule={"steps": 12, "global_batch_size": 16})
    both = settings.model_dump(mode="json") | {
        "runtime": {"num_workers": 0, "checkpoint_every": 4, "micro_batch_size": 8}
    }
    both["sharding"] = begun
    script = tmp_path / "stops.py"
    late = _SCRIPT.replace("if step == {step} and last:", "if step in (5, 6) and last:")  # 5: the state gets whole
    script.write_text(late.replace("{body}", "__import__('time').sleep(2) if step == 5 else os._exit(3)"))
    assert run_ranks(script, PretrainConfig.model_validate(both), tmp_path / "job").returncode != 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-4"]
    other = both | {"sharding": ended, "guards": {"max_rollbacks": 9}}
    run_module("pretrain", PretrainConfig.model_validate(other))
    rows = losses(tmp_path / "run")
    assert [row["samples"] for row in rows] == list(range(16, 16 * 13, 16))
    single = {**ALIKE, "schedule": {"steps": 12, "global_batch_size": 16}, "sharding": {"backend": "torch"}}
    run_module("pretrain", config(synthetic.seed, tmp_path / "single", **single))
    for ours, other in zip(rows, losses(tmp_path / "single"), strict=True):
        assert ours["loss"] == pytest.approx(other["loss"], rel=1e-2)
    assert open_artifact(str(tmp_path / "run"), "checkpoint").metrics["resumed_at"] == 4


def test_an_optimizer_goes_on_in_files(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    """Begun in memory; wide enough that DeepSpeed writes files, which it does from 1 MiB a tensor on."""
    if not Path(os.environ.get("TORCH_EXTENSIONS_DIR", ""), "async_io", "async_io.so").exists():
        pytest.skip("TORCH_EXTENSIONS_DIR holds no async_io op; DeepSpeed's AsyncIOBuilder().load() takes 4 minutes")
    wide = {**ALIKE, "model": {**ALIKE["model"], "embed_dim": 256}, "schedule": {"steps": 8, "global_batch_size": 8}}
    wide["runtime"] = {"num_workers": 0, "checkpoint_every": 3}
    settings = config(synthetic.seed, tmp_path / "run", **wide, sharding=STAGES[3])
    script = tmp_path / "stops.py"
    script.write_text(_SCRIPT.format(step=5, body="os._exit(3)"))
    assert run_ranks(script, settings, tmp_path / "job", 1).returncode != 0
    nvme = {"zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": str(tmp_path / "nvme")}
    run_module("pretrain", config(synthetic.seed, tmp_path / "run", **wide, sharding=nvme))
    assert list((tmp_path / "nvme").rglob("exp_avg-*.swp"))
    run_module("pretrain", config(synthetic.seed, tmp_path / "single", **wide, sharding={"backend": "torch"}))
    for ours, other in zip(losses(tmp_path / "run"), losses(tmp_path / "single"), strict=True):
        assert ours == pytest.approx(other, rel=1e-3)


# Runs the stage, but at some step something happens on the last rank.
_SCRIPT = """
import hashlib, os, sys
import torch
from infra.launch.job import module_main
from pretrain import run, trainer
from pretrain.config import PretrainConfig
from pretrain.monitoring.watchdog import EXIT_HANG
from pretrain.train_module import PretrainModule

step, last = 0, int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
forward = PretrainModule.forward

def begin(self, number, before=PretrainModule.begin_step):
    global step
    step = number
    pairs = before(self, number)
    digest = hashlib.sha256()
    for tensor in [*self.parameters(), *self.objectives.buffers()]:
        digest.update(getattr(tensor, "ds_tensor", tensor).data.numpy().tobytes())
    with open(sys.argv[1] + "/digests-" + os.environ.get("RANK", "0"), "a") as file:
        file.write(digest.hexdigest() + chr(10))
    return pairs

def changed(self, batch, temperature):
    loss, terms = forward(self, batch, temperature)
    if step == {step} and last:
        {body}
    return loss, terms

PretrainModule.begin_step, PretrainModule.forward = begin, changed
module_main(PretrainConfig, run)
"""


@pytest.mark.parametrize("sharding", [{"backend": "torch"}, *STAGES, *OFFLOADED[1:]], ids=_words)
def test_a_step_that_is_no_number_on_one_rank_is_skipped_on_all(
    synthetic: SyntheticCorpora, tmp_path: Path, sharding: dict[str, object]
) -> None:
    """Weights, teacher and centers stay as they were. Bad is the loss, or at some stages the gradient alone."""
    ranks = 1 if "backend" in sharding else 2
    changes = {**ALIKE, "objectives": [{**TINY["objectives"][0], "centering": "softmax"}], "sharding": sharding}
    settings = config(
        synthetic.seed, tmp_path / "run", **changes, schedule={"steps": 6, "global_batch_size": 8 * ranks}
    )
    script = tmp_path / "nan.py"
    alone = sharding.get("zero_stage") == 1 or sharding == OFFLOADED[-1]
    bad = "loss = loss + 1e25 * (loss - loss.detach())" if alone else "loss = loss * torch.nan"
    script.write_text(_SCRIPT.format(step=3, body=bad))
    assert run_ranks(script, settings, tmp_path / "job", ranks).returncode == 0
    rows = losses(tmp_path / "run")
    assert ["skipped" in row for row in rows] == [False, False, False, True, False, False]
    assert rows[-1]["samples"] == 6 * 8 * ranks
    for rank in range(ranks):  # of every parameter and center, as they were before each step
        digests = (tmp_path / "job" / f"digests-{rank}").read_text().split()
        assert [digests[at] == digests[at + 1] for at in range(5)] == [False, False, False, True, False]
    weights = load_file(tmp_path / "run" / WEIGHTS)
    assert all(value.isfinite().all() for value in weights.values())
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    (skipped,) = map(json.loads, lines)
    assert skipped["step"] == 3
    assert [len(keys) for keys in skipped["keys"]] == ranks * [8]


def test_a_training_that_stays_bad_goes_back_and_on_with_other_samples(
    synthetic: SyntheticCorpora, tmp_path: Path
) -> None:
    guards = {"max_consecutive_skips": 2, "max_rollbacks": 1}
    changes = {
        **ALIKE,
        "guards": guards,
        "sharding": {"backend": "torch"},
        "schedule": {"steps": 12, "global_batch_size": 8},
    }
    script = tmp_path / "bad.py"
    # Samples of the seventh to ninth step are bad, wherever they come.
    body = "loss = loss * (torch.nan if ({low} <= int(batch.positions[0]) < {high}) else 1)"
    code = _SCRIPT.replace("if step == {step} and last:", "if True:")
    script.write_text(code.replace("{body}", body.format(low=6 * 8, high=9 * 8)))
    assert run_ranks(script, config(synthetic.seed, tmp_path / "run", **changes), tmp_path / "job", 1).returncode == 0
    rows = losses(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(12))
    assert open_artifact(str(tmp_path / "run"), "checkpoint").metrics["rollbacks"] == 1
    assert rows[4]["samples"] == 40
    assert rows[5]["samples"] == 72  # back to step 5 after two bad steps, on with what had not been seen
    assert "skipped" in rows[5]

    script.write_text(code.replace("{body}", body.format(low=6 * 8, high=1000 * 8)))
    hopeless = config(synthetic.seed, tmp_path / "hopeless", **changes)
    assert run_ranks(script, hopeless, tmp_path / "job", 1).returncode != 0
    report = json.loads((tmp_path / "job" / "exit_status.json").read_text())["message"]
    assert "2 steps in a row were skipped, after 1 rollbacks" in report


def test_a_rank_that_hangs_ends_the_job_by_name(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    changes = {
        **ALIKE,
        "runtime": {"num_workers": 0, "hang_timeout_s": 5},
        "schedule": {"steps": 12, "global_batch_size": 16},
    }
    script = tmp_path / "hangs.py"
    script.write_text(_SCRIPT.format(step=3, body="__import__('time').sleep(1000)"))
    started = time.monotonic()
    ended = run_ranks(script, config(synthetic.seed, tmp_path / "run", **changes), tmp_path / "job")
    assert ended.returncode != 0
    # Whichever rank's watch ends first says it, on its own log; all of them say it for the job.
    report = json.loads((tmp_path / "job" / "exit_status.json").read_text())
    assert report["code"] == EXIT_HANG
    assert report["message"] == "rank 1 (step 3: forward) made no progress for 5 s; the other ranks are blocked"
    assert time.monotonic() - started < 90


def test_a_rank_that_dies_ends_the_job_by_name(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(_SCRIPT.format(step=3, body="os.kill(os.getpid(), 9)"))
    settings = config(synthetic.seed, tmp_path / "run", **ALIKE, schedule={"steps": 12, "global_batch_size": 16})
    Job(tmp_path / "job").prepare(settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ended = subprocess.run([*command, str(tmp_path / "job")], timeout=400, check=False, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "local_rank: 1" in ended.stderr
    assert "exitcode: -9" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_preempted_run_saves_its_state_and_ends_as_the_uninterrupted_one(
    synthetic: SyntheticCorpora, tmp_path: Path, number: signal.Signals
) -> None:
    changes = {
        "runtime": {"num_workers": 2, "checkpoint_every": 1000},
        "schedule": {"steps": 40, "global_batch_size": 8},
    }
    run_module("pretrain", config(synthetic.seed, tmp_path / "whole", **changes, sharding={"backend": "torch"}))
    settings = config(synthetic.seed, tmp_path / "run", **changes, sharding={"backend": "torch"})
    job = tmp_path / "job"
    job.mkdir()
    (job / "config.json").write_text(settings.model_dump_json())
    script = tmp_path / "slow.py"
    script.write_text(_SCRIPT.replace("if step == {step} and last:", "if step == 3:").replace("{body}", _WAIT))
    process = subprocess.Popen([sys.executable, str(script), str(job)])
    deadline = time.monotonic() + 120
    while not (job / "waiting").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert process.wait(60) == EXIT_PREEMPTED
    assert "stopped after step 4, as asked" in (job / "exit_status.json").read_text()
    run_module("pretrain", settings)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    resumed, whole = (load_file(tmp_path / name / WEIGHTS) for name in ("run", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


_WAIT = "open(sys.argv[1] + '/waiting', 'w').close(); __import__('time').sleep(1)"
