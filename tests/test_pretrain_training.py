"""The engine: it learns, DeepSpeed equals plain torch, and a killed run goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

import pretrain
from infra.artifacts.artifact import open_artifact
from infra.errors import UserError
from pretrain import schedules
from pretrain.checkpoint.artifact import WEIGHTS, Checkpoint
from pretrain.checkpoint.spec import checkpoint_spec
from pretrain.config import PretrainConfig, PretrainSettings, identity_settings
from pretrain.monitoring.metrics_log import METRICS
from pretrain.sharding.base import clip_gradients
from pretrain.sharding.single_process import SingleProcessBackend, gradients
from pretrain.train import build_module, build_view_dataset
from pretrain.trainer import parameter_groups
from tests.conftest import SyntheticCorpora, encode_image, image_folder, ingest_folder, picture
from tests.ranks import run_module

HEAD = {"hidden_dim": 32, "bottleneck_dim": 16, "num_prototypes": 16}
TINY = {
    "model": {
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 8,
        "image_size": 32,
        "drop_path_rate": 0.3,
        "layer_scale_init": 0.5,
    },
    "objectives": [{"kind": "dino", "head": HEAD}, {"kind": "ibot", "head": HEAD}, {"kind": "koleo"}],
    "views": {"global_crops": {"size": 32}, "local_crops": {"size": 16}, "num_local_crops": 2},
    "schedule": {"steps": 12, "global_batch_size": 16},
    "optimizer": {"base_lr": 2e-2, "warmup_steps": 2, "layerwise_lr_decay": 0.9, "freeze_last_layer_steps": 2},
    "teacher": {"momentum": [0.9, 1.0], "temperature": [0.06, 0.07]},
    "runtime": {"num_workers": 2, "checkpoint_every": 3, "micro_batch_size": 8},
}


def config(corpus: str, out: Path, **changes: object) -> PretrainConfig:
    return PretrainConfig.model_validate({**TINY, **changes, "corpora": [corpus], "out": str(out)})


def losses(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(synthetic: SyntheticCorpora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run under DeepSpeed."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run_module("pretrain", config(synthetic.seed, out))
    return out


@pytest.mark.multiprocess
def test_deepspeed_trains_as_plain_torch(synthetic: SyntheticCorpora, trained: Path, tmp_path: Path) -> None:
    run_module("pretrain", config(synthetic.seed, tmp_path / "torch", sharding={"backend": "torch"}))
    for ours, plain in zip(losses(trained), losses(tmp_path / "torch"), strict=True):
        assert ours == pytest.approx(plain, rel=1e-3)


@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_alike(synthetic: SyntheticCorpora, trained: Path, tmp_path: Path, stage: int) -> None:
    run_module("pretrain", config(synthetic.seed, tmp_path / "zero", sharding={"zero_stage": stage}))
    for ours, plain in zip(losses(tmp_path / "zero"), losses(trained), strict=True):
        assert ours == pytest.approx(plain, rel=1e-3)


TEXT = {"context": 16, "width": 16, "num_heads": 2, "layers": 1}
EVERY_KIND: list[dict[str, object]] = [
    {"kind": "dino", "head": HEAD},
    {"kind": "ibot", "share_head": True},
    {"kind": "koleo", "distributed": True},
    {"kind": "gram", "start_step": 1, "update_every": 1},
    {"kind": "mae", "embed_dim": 16, "depth": 1, "num_heads": 2},
    {"kind": "simmim"},
    {"kind": "clip", "embed_dim": 16, "text": TEXT},
    {"kind": "siglip", "embed_dim": 16, "text": TEXT},
]


def captioned(folder: Path) -> str:
    """URL of a corpus of images with captions."""
    images = image_folder(folder / "images", 24)
    for path in images.glob("*.png"):
        path.with_suffix(".txt").write_text(f"picture number {path.stem}")
    return ingest_folder(images, folder / "corpus").artifact.url


@pytest.mark.multiprocess
def test_every_objective_trains_sharded_as_plainly(tmp_path: Path) -> None:
    corpus = captioned(tmp_path)
    changes = {
        "objectives": EVERY_KIND,
        "views": {**TINY["views"], "gram_crop_size": 64},
        "schedule": {"steps": 4, "global_batch_size": 8},
    }
    run_module("pretrain", config(corpus, tmp_path / "plain", **changes, sharding={"backend": "torch"}))
    run_module("pretrain", config(corpus, tmp_path / "sharded", **changes, sharding={"zero_stage": 3}))
    plain, sharded = losses(tmp_path / "plain"), losses(tmp_path / "sharded")
    assert {kind["kind"] for kind in EVERY_KIND} - {"dino"} <= set(plain[-1])
    assert "gram" not in plain[0]
    for ours, other in zip(sharded, plain, strict=True):
        assert ours == pytest.approx(other, rel=1e-3)
    half = config(corpus, tmp_path / "half", **changes, sharding={"zero_stage": 2, "precision": "bf16"})
    run_module("pretrain", half)
    for ours, other in zip(losses(tmp_path / "half"), plain, strict=True):
        assert ours["loss"] == pytest.approx(other["loss"], rel=0.05)


@pytest.mark.multiprocess
@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_ctrl_c_twice_ends_with_the_code_of_a_saved_state(
    launcher: str, synthetic: SyntheticCorpora, tmp_path: Path
) -> None:
    settings = config(
        synthetic.seed, tmp_path / "run", schedule={"steps": 100_000, "global_batch_size": 8}, launcher=launcher
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(settings.model_dump_json())))
    command = [sys.executable, "-m", "flows.cli", "pretrain", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until_saved(Path(settings.out), process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert re.search(r"fovea: pretrain: stopped .*; run again to resume", told)
    assert launcher == "torchrun" or "Traceback" not in told  # torchrun shows one of its own


def until_saved(out: Path, process: subprocess.Popen[Any]) -> None:
    """Wait until some state of a training is whole."""
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoints/step-*/train_state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def killed_once(settings: PretrainConfig, job: Path) -> None:
    """Train until some state is whole, and some steps more; kill all of it."""
    job.mkdir()
    (job / "config.json").write_text(settings.model_dump_json())
    process = subprocess.Popen([sys.executable, "-m", "pretrain", str(job)], start_new_session=True)
    until_saved(Path(settings.out), process)
    time.sleep(random.uniform(0, 0.3))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (Path(settings.out) / "manifest.json").exists()


@pytest.mark.multiprocess
def test_a_killed_run_ends_as_the_uninterrupted_one_bit_for_bit(
    synthetic: SyntheticCorpora, trained: Path, tmp_path: Path
) -> None:
    """DINO, iBOT and KoLeo; two loader workers, two micro-batches a step."""
    out = tmp_path / "run"
    killed_once(config(synthetic.seed, out), tmp_path / "job")
    run_module("pretrain", config(synthetic.seed, out))
    ends_alike(out, trained)


def ends_alike(resumed: Path, whole: Path) -> None:
    """Every row of telemetry, every weight and the id are the same."""
    assert Checkpoint.open(str(resumed)).artifact.metrics["resumed_at"] >= 3
    assert losses(resumed) == losses(whole)
    ours, theirs = load_file(resumed / WEIGHTS), load_file(whole / WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert Checkpoint.open(str(resumed)).artifact.id == Checkpoint.open(str(whole)).artifact.id


@pytest.mark.multiprocess
def test_a_killed_clip_run_ends_as_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    corpus = captioned(tmp_path)
    changes = {
        "objectives": [{"kind": "clip", "embed_dim": 16, "text": TEXT}],
        "schedule": {"steps": 16, "global_batch_size": 16},
    }
    run_module("pretrain", config(corpus, tmp_path / "whole", **changes))
    settings = config(corpus, tmp_path / "run", **changes)
    killed_once(settings, tmp_path / "job")
    run_module("pretrain", settings)
    ends_alike(tmp_path / "run", tmp_path / "whole")


@pytest.mark.multiprocess
def test_a_slow_teacher_moves_in_bf16_training(synthetic: SyntheticCorpora, trained: Path, tmp_path: Path) -> None:
    """At a momentum of 0.9999 an average in bf16 would stand still."""
    slow = {"teacher": {"momentum": [0.9999, 0.9999], "temperature": [0.06, 0.07]}}
    half = config(synthetic.seed, tmp_path / "run", **slow, sharding={"zero_stage": 2, "precision": "bf16"})
    run_module("pretrain", half)
    found = load_file(tmp_path / "run" / WEIGHTS)
    teacher, student = (
        {name.removeprefix(part): value for name, value in found.items() if name.startswith(part)}
        for part in ("teacher.", "student.")
    )
    before = Checkpoint.open(str(tmp_path / "run")).untrained_backbone().state_dict()
    changed = [name for name in before if not torch.equal(student[name], before[name])]
    assert len(changed) > 20
    for name in changed:
        assert teacher[name].dtype == torch.float32
        assert not torch.equal(teacher[name], before[name])
    name = "blocks.0.attn.qkv.weight"
    same = teacher[name].bfloat16() == before[name].bfloat16()
    assert same.float().mean() > 0.5, same.float().mean()


@pytest.mark.multiprocess
def test_a_trainer_dies_with_the_process_that_started_it(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    long = config(synthetic.seed, tmp_path / "run", schedule={"steps": 100_000, "global_batch_size": 8})
    (tmp_path / "long.json").write_text(long.model_dump_json())
    script = (
        "from infra.launch.launcher import run_module; from pretrain.config import PretrainConfig\n"
        f"run_module('pretrain', PretrainConfig.model_validate_json(open({str(tmp_path / 'long.json')!r}).read()))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    mark = tmp_path / "run" / "checkpoints"
    while not mark.exists():
        assert parent.poll() is None
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True).stdout.split()
    assert children
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() and "Z" not in _state(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _state(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return "Z"


def test_an_empty_or_missing_corpus_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no corpus or selection here"):
        pretrain.run(config(str(tmp_path / "nothing"), tmp_path / "out"))


def test_a_checkpoint_gives_its_own_untrained_backbone(synthetic: SyntheticCorpora, trained: Path) -> None:
    checkpoint = Checkpoint.open(str(trained))
    before = build_module(config("x", trained)).student.state_dict()
    after = checkpoint.backbone().state_dict()
    assert all(torch.equal(value, before[name]) for name, value in checkpoint.untrained_backbone().state_dict().items())
    assert not torch.equal(after["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


def test_the_teacher_moves_by_the_momentum() -> None:
    settings = PretrainConfig.model_validate({**TINY, "corpora": ["x"], "out": "y"})
    learner = build_module(settings)
    for parameter in learner.student.parameters():
        parameter.data.add_(1.0)
    before = {name: value.clone() for name, value in learner.teacher.state_dict().items()}
    plain = SingleProcessBackend(learner, torch.optim.AdamW(learner.student.parameters()))
    plain.ema_update(learner.ema_pairs(), 0.9)
    for name, value in learner.teacher.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.1)
    plain.ema_update(learner.ema_pairs(), 1.0)
    torch.testing.assert_close(learner.teacher.norm.bias, before["norm.bias"] + 0.1)


def test_schedules_are_dinov2s() -> None:
    """Learning rate by the square root of the batch, linear warmup, cosines; values of the published recipe."""
    settings = PretrainConfig.model_validate(
        {
            "corpora": ["x"],
            "out": "y",
            "schedule": {"steps": 125_000, "global_batch_size": 2048},
            "optimizer": {"base_lr": 4e-3, "warmup_steps": 12_500},
            "teacher": {"temperature_warmup_steps": 37_500},
        }
    )
    assert schedules.schedule_values(settings, 0).lr == 0
    assert schedules.schedule_values(settings, 12_500).lr == pytest.approx(5.657e-3, rel=1e-3)
    assert schedules.schedule_values(settings, 125_000).lr == pytest.approx(1e-6)
    middle = schedules.schedule_values(settings, 62_500)
    assert middle.weight_decay == pytest.approx(0.22)
    assert middle.momentum == pytest.approx(0.996)
    assert schedules.schedule_values(settings, 18_750).temperature == pytest.approx(0.055)
    assert schedules.schedule_values(settings, 40_000).temperature == pytest.approx(0.07)


def test_parameter_groups_follow_dinov2() -> None:
    settings = PretrainConfig.model_validate({**TINY, "corpora": ["x"], "out": "y"})
    learner = build_module(settings)
    names = {id(parameter): name for name, parameter in learner.named_parameters()}
    found = {}
    for group in parameter_groups(learner, settings):
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr_multiplier"], group["weight_decay_multiplier"])
    assert found["student.cls_token"] == (pytest.approx(0.9**3), 0)
    assert found["student.patch_embed.proj.weight"] == (pytest.approx(0.2 * 0.9**3), 1)
    assert found["student.blocks.0.attn.qkv.weight"] == (pytest.approx(0.9**2), 1)
    assert found["student.blocks.1.ls1.gamma"] == (pytest.approx(0.9), 0)
    assert found["student.norm.weight"] == (1, 0)
    assert found["objectives.dino.head.mlp.0.weight"] == (1, 1)
    assert not any(name.startswith("teacher.") or "teacher_head" in name for name in found)


@pytest.mark.parametrize("clip_of", ["all", "parts"])
def test_gradients_are_clipped_as_torch_does(clip_of: str) -> None:
    """By one norm, or backbone and head each by its own."""
    changes = {"optimizer": {"grad_clip_scope": clip_of}, "objectives": TINY["objectives"][:1]}
    settings = PretrainConfig.model_validate({**TINY, **changes, "corpora": ["x"], "out": "y"})
    learner = build_module(settings)
    torch.manual_seed(0)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    expected = [parameter.grad.clone() for parameter in trained]
    groups = parameter_groups(learner, settings)
    stepped = clip_gradients(gradients(groups), 2.0, lambda squares: squares)
    ours = [parameter.grad for parameter in trained]
    for parameter, gradient in zip(trained, expected, strict=True):
        parameter.grad = gradient
    assert stepped.gradient_norm == pytest.approx(float(torch.nn.utils.get_total_norm(expected)), rel=1e-5)
    backbone = {id(parameter) for parameter in learner.student.parameters()}
    parts = [[p for p in trained if id(p) in backbone], [p for p in trained if id(p) not in backbone]]
    for part in parts if clip_of == "parts" else [trained]:
        torch.nn.utils.clip_grad_norm_(part, 2.0)
    for mine, parameter in zip(ours, trained, strict=True):
        torch.testing.assert_close(mine, parameter.grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": [{"kind": "gram"}]}, "gram anchors what other objectives learn"),
        ({"objectives": [{"kind": "dino"}, {"kind": "dino"}]}, "each kind may be given once"),
        ({"objectives": [{"kind": "ibot", "share_head": True}]}, "ibot cannot have share_head without dino"),
        ({"objectives": [{"kind": "mae", "embed_dim": 48, "num_heads": 5}]}, "no multiple of 4 and of num_heads 5"),
        ({"objectives": [{"kind": "clip", "text": {"width": 50}}]}, "width 50 is no multiple of num_heads 8"),
        ({"objectives": [{"kind": "clip"}, {"kind": "siglip", "text": {"context": 8}}]}, "the same text.context"),
        ({"views": {"num_global_crops": 1}}, "needs views.num_global_crops 2"),
        ({"objectives": [{"kind": "mae"}], "model": {"pos_embed": "rope"}}, "mae needs model.pos_embed"),
        ({"sharding": {"backend": "torch", "offload_optimizer": "cpu"}}, "offload with deepspeed"),
        ({"sharding": {"offload_optimizer": "cpu"}}, "offload_optimizer needs zero_stage 1"),
        ({"sharding": {"zero_stage": 2, "offload_optimizer": "nvme", "nvme_path": "/x"}}, "1 or more, nvme 3"),
        ({"sharding": {"zero_stage": 2, "offload_parameters": "cpu"}}, "offload_parameters needs zero_stage 3"),
        ({"sharding": {"zero_stage": 3, "offload_optimizer": "nvme"}}, "nvme needs nvme_path"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PretrainConfig.model_validate({"corpora": ["x"], "out": "y", **changes})


def test_how_a_training_is_sharded_is_no_part_of_what_it_is_known_by() -> None:
    nvme = {"zero_stage": 3, "offload_optimizer": "nvme", "offload_parameters": "cpu", "nvme_path": "/x"}
    known = [identity_settings(config("x", Path("y"), sharding=sharding)) for sharding in ({"backend": "torch"}, nvme)]
    assert known[0] == known[1]
    assert known[0]["sharding"] == {"precision": "fp32"}


@pytest.mark.multiprocess
def test_bf16_reaches_the_products_under_both_engines(synthetic: SyntheticCorpora) -> None:
    """The backbone sees autocast from inside; DeepSpeed would switch off one from outside."""
    settings = PretrainSettings.model_validate({**TINY, "sharding": {"precision": "bf16"}})
    learner = build_module(settings)
    learner.precision = settings.sharding.precision
    seen: list[torch.dtype] = []
    learner.student.blocks[0].attn.register_forward_hook(lambda module, _, out: seen.append(out.dtype))  # type: ignore[union-attr]
    learner.begin_step(0)
    batch = build_view_dataset([synthetic.seed], settings).batch(np.arange(4))
    with torch.autocast("cpu", enabled=False):  # as DeepSpeed's engine calls it
        learner(batch, 0.05)
    assert seen == [torch.bfloat16]


def test_a_high_resolution_phase_starts_from_the_end_of_another(
    synthetic: SyntheticCorpora, trained: Path, tmp_path: Path
) -> None:
    """Weights and heads come along, the position table is resized, and the lineage names where they came from."""
    larger = {
        "model": {**TINY["model"], "image_size": 48},
        "views": {**TINY["views"], "global_crops": {"size": 48}},
        "schedule": {"steps": 2, "global_batch_size": 8},
        "optimizer": {"base_lr": 1e-6},
        "sharding": {"backend": "torch"},
    }
    settings = config(synthetic.seed, tmp_path / "high", **larger, init_from=str(trained))
    artifact = pretrain.run(settings)
    before, after = Checkpoint.open(str(trained)), Checkpoint.open(artifact.url)
    assert after.weights("student.")["pos_embed"].shape == (1, 1 + 36, 32)
    name = "objectives.dino.head.mlp.0.weight"
    torch.testing.assert_close(after.weights()[name], before.weights()[name], rtol=0, atol=1e-4)
    assert artifact.manifest.inputs["init_from"].id == before.artifact.id
    assert artifact.id != checkpoint_spec(settings.model_copy(update={"init_from": None})).id
    anchored = {**larger, "objectives": [*TINY["objectives"][:1], {"kind": "gram"}]}
    gram = Checkpoint.open(
        pretrain.run(config(synthetic.seed, tmp_path / "gram", **anchored, init_from=str(trained))).url
    )
    anchor, teacher = (gram.weights(f"{each}.")["norm.weight"] for each in ("objectives.gram.anchor", "teacher"))
    torch.testing.assert_close(anchor, before.weights("teacher.")["norm.weight"])
    assert not torch.equal(anchor, teacher)
    other = {**larger, "model": {**TINY["model"], "embed_dim": 64, "image_size": 48}}
    wider = config(synthetic.seed, tmp_path / "other", **other, init_from=str(trained))
    with pytest.raises(UserError, match="does not fit the settings"):
        pretrain.run(wider)


@pytest.mark.multiprocess
def test_bad_samples_are_counted_and_too_many_stop_the_run(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 30)
    for name in ("torn", "broken"):
        (folder / f"{name}.png").write_bytes(encode_image(picture(99))[:-40])
    corpus = ingest_folder(folder, tmp_path / "corpus", check="header").artifact.url
    changes = {"schedule": {"steps": 4, "global_batch_size": 16}, "sharding": {"backend": "torch"}}
    run_module("pretrain", config(corpus, tmp_path / "run", **changes))
    rows = losses(tmp_path / "run")
    assert [row["samples"] for row in rows] == [16, 32, 48, 64]
    counted = open_artifact(str(tmp_path / "run"), "checkpoint").metrics["bad_samples"]
    assert counted == {"truncated": sum(row.get("bad_samples_truncated", 0) for row in rows)}
    assert 4 <= counted["truncated"] < 12  # each is met once an epoch, and now and then in another's place
    with pytest.raises(
        UserError, match=r"samples cannot be used \(truncated \d+\), more than runtime.max_bad_sample_fraction 0"
    ):
        run_module("pretrain", config(corpus, tmp_path / "strict", **changes, runtime={"max_bad_sample_fraction": 0}))
