"""Plans: work and memory that were reckoned are those that are counted and allocated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import PretrainSettings
from pretrain.data.loader import Batch
from pretrain.planning import memory
from pretrain.planning.dryrun import build_on_meta, count_flops, count_parameters, make_batch, measure_peak
from pretrain.train import build_module
from tests.conftest import exit_code
from tests.test_pretrain_training import EVERY_KIND, TINY

HEAD = {"hidden_dim": 1024, "bottleneck_dim": 256, "num_prototypes": 4096}
SMALL = {
    "model": {"size": "small", "patch_size": 16, "image_size": 224, "drop_path_rate": 0.3},
    "objectives": [{"kind": "dino", "head": HEAD}, {"kind": "ibot", "head": HEAD}, {"kind": "koleo"}],
    "views": {"num_local_crops": 2},
}
IMAGES = 4


def settings(**changes: object) -> PretrainSettings:
    return PretrainSettings.model_validate({**SMALL, **changes})


def real(asked: PretrainSettings, images: int) -> Batch:
    """A batch of black images and empty captions."""
    return Batch(**{name: torch.zeros_like(value) for name, value in vars(make_batch(asked, images)).items()})


MAE = {"objectives": [{"kind": "mae", "embed_dim": 64, "depth": 2, "num_heads": 2}], "views": {"num_global_crops": 1}}
EVERYTHING = {**TINY, "objectives": EVERY_KIND, "views": {**TINY["views"], "gram_crop_size": 64}}


@pytest.mark.parametrize("changes", [{}, {"sharding": {"precision": "bf16"}}, MAE, EVERYTHING], ids=range(4))
def test_flops_and_parameters_are_those_that_are_counted(changes: dict[str, object]) -> None:
    asked = settings(**changes)
    shapes = build_on_meta(lambda: build_module(asked))
    learner = build_module(asked).train()
    learner.precision = asked.sharding.precision
    learner.begin_step(asked.schedule.steps - 1)
    assert count_parameters(shapes) == count_parameters(learner)
    assert count_parameters(learner).total == sum(each.numel() for each in learner.parameters())
    with FlopCounterMode(display=False) as counter:
        learner(real(asked, IMAGES), 0.05)[0].backward()
    assert count_flops(shapes, asked, IMAGES) == counter.get_total_flops()
    assert count_flops(learner, asked, IMAGES) == counter.get_total_flops()
    assert all(each.isfinite().all() for each in learner.parameters())  # the learner itself stayed real


def test_what_is_computed_again_is_no_work() -> None:
    spared = settings(runtime={"activation_checkpointing": "full"})
    shapes = build_on_meta(lambda: build_module(spared))
    assert count_flops(shapes, spared, IMAGES) == count_flops(shapes, settings(), IMAGES)
    assert measure_peak(shapes, spared, IMAGES) < 0.6 * measure_peak(shapes, settings(), IMAGES)


def allocated(asked: PretrainSettings, tmp_path: Path, ranks: int) -> int:
    """The most that a rank's allocator gives out in two steps."""
    (tmp_path / "settings.json").write_text(json.dumps(asked.model_dump(mode="json")))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    module = ["-m", "tests.allocation_program", str(tmp_path / "settings.json"), str(IMAGES)]
    done = subprocess.run([sys.executable, *launcher, *module], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "changes",
    [
        {"sharding": {"backend": "torch"}},
        {"sharding": {"backend": "torch", "precision": "bf16"}, "runtime": {"activation_checkpointing": "selective"}},
        *({"sharding": {"zero_stage": stage}} for stage in (1, 2, 3)),
    ],
    ids=["torch", "bf16", "zero 1", "zero 2", "zero 3"],
)
def test_memory_is_what_is_allocated_to_15_percent(changes: dict[str, object], tmp_path: Path) -> None:
    asked = settings(**changes)
    stage, ranks = asked.sharding.zero_stage, 1 if asked.sharding.backend == "torch" else 2
    shapes = build_on_meta(lambda: build_module(asked))
    passes = memory.activations({images: measure_peak(shapes, asked, images) for images in (2, 8)}, IMAGES)
    reckoned = memory.memory_of_rank(count_parameters(shapes), passes, stage, ranks, False, asked.sharding).total
    assert reckoned == pytest.approx(allocated(asked, tmp_path, ranks), rel=0.15)


def test_the_plan_tells_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("plan", "dinov2_vitl16_short", "--gpus", "8", "--gpu", "a100", "--price", "2") == 0
    shown = capsys.readouterr().out
    assert "303" in shown.split("backbone")[1].splitlines()[0]  # M parameters of ViT-L/16
    assert "days on 8 x a100" in shown
    assert "cost" in shown
    assert "too much" in shown
    few = ("--gpus", "8", "--gib", "12", "--tflops", "100", "--runtime.micro_batch_size", "64")
    assert exit_code("plan", "dinov2_vitl16_short", *few) == 0
    assert "does not fit" in capsys.readouterr().out


def test_a_gpu_nobody_knows_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("plan", "tiny_cpu", "--gpus", "1", "--gpu", "abacus") == 2
    assert "gpu: abacus is unknown; give one of a100-40gb" in capsys.readouterr().err
