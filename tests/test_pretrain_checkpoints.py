"""Saved states: whole or absent, kept as long as asked, in a folder or an object store."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from infra.artifacts.artifact import open_artifact
from infra.errors import UserError
from infra.storage import filesystem
from pretrain.checkpoint.artifact import _SETTINGS_NOT_IN_SHAPES
from pretrain.checkpoint.manager import TRAINING, CheckpointManager, TrainState
from pretrain.config import Retention
from pretrain.models.config import TimmNetworkConfig, VisionTransformerConfig
from pretrain.sharding import state
from pretrain.sharding.single_process import SingleProcessBackend
from tests.conftest import SyntheticCorpora
from tests.ranks import run_module
from tests.test_pretrain_training import TINY, config, losses

places = pytest.mark.parametrize("remote", [False, True], ids=["folder", "store"])


def place(tmp_path: Path, remote: bool) -> tuple[Path, str]:
    """Work directory and URL; `local://` is no local path to Fovea, so it stands for an object store."""
    if not remote:
        return tmp_path / "run", str(tmp_path / "run")
    (tmp_path / "store").mkdir(exist_ok=True)
    return tmp_path / "work", f"local://{tmp_path / 'store'}"


def engine() -> SingleProcessBackend:
    module = nn.Linear(3, 2)
    return SingleProcessBackend(module, torch.optim.AdamW(module.parameters()))


def saved(saves: CheckpointManager, trained: SingleProcessBackend, step: int) -> None:
    trained.backward(trained.forward(torch.ones(1, 3)).sum())
    trained.step()
    rows = [{"step": float(number), "loss": 1.0} for number in range(step)]
    saves.save_async(trained, step, rows, TrainState(samples=8 * step))
    saves.wait()


@places
def test_a_saved_state_comes_back(tmp_path: Path, remote: bool) -> None:
    work, url = place(tmp_path, remote)
    trained = engine()
    saved(CheckpointManager(work, url, Retention()), trained, 3)
    other, saves = engine(), CheckpointManager(work, url, Retention())
    assert saves.latest_step() == 3
    rows, tally = saves.load(other, 3)
    assert (len(rows), tally) == (3, TrainState(samples=24))
    assert all(torch.equal(a, b) for a, b in zip(other.module.parameters(), trained.module.parameters(), strict=True))
    for parameter, same in zip(other.module.parameters(), trained.module.parameters(), strict=True):
        assert torch.equal(other.moment(parameter, "exp_avg"), trained.moment(same, "exp_avg"))
    saves.update_train_state(3, TrainState(24, rollbacks=1))
    assert saves.load(other, 3)[1].rollbacks == 1
    saves.finalize(3)
    assert sorted(path.name for path in (work / TRAINING).iterdir()) == [
        "metrics.jsonl",
        "state-00000.safetensors",
        "state.json",
        "train_state.json",
    ]
    assert CheckpointManager(work, url, Retention()).latest_step() == 3


@places
def test_the_last_few_and_the_young_stay(tmp_path: Path, remote: bool) -> None:
    trained, (work, url) = engine(), place(tmp_path, remote)
    few, folder = CheckpointManager(work, url, Retention(latest=2)), Path(url.removeprefix("local://")) / "checkpoints"
    for step in (1, 2, 3, 10):
        saved(few, trained, step)
    assert {path.name for path in folder.iterdir()} == {"step-3", "step-10"}
    aged = CheckpointManager(work, url, Retention(hours=1))
    os.utime(folder / "step-3" / "train_state.json", (0, 0))
    saved(aged, trained, 11)
    assert {path.name for path in folder.iterdir()} == {"step-10", "step-11"}


@places
def test_half_a_state_is_none(tmp_path: Path, remote: bool) -> None:
    work, url = place(tmp_path, remote)
    saves, folder = (
        CheckpointManager(work, url, Retention(latest=3)),
        Path(url.removeprefix("local://")) / "checkpoints",
    )
    for step in (2, 4):
        saved(saves, engine(), step)
    (folder / "step-4" / "train_state.json").unlink()
    assert CheckpointManager(work, url, Retention()).latest_step() == 2
    assert not (folder / "step-4").exists()


def test_a_full_disk_harms_no_earlier_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves, trained = CheckpointManager(tmp_path, str(tmp_path), Retention()), engine()
    saved(saves, trained, 1)

    def full(part: state.RankState, folder: Path) -> list[Path]:
        (folder / "state.json").write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state, "write", full)
    with pytest.raises(UserError, match="No space left on device; the last whole"):
        saved(saves, trained, 2)
    again = CheckpointManager(tmp_path, str(tmp_path), Retention())
    assert again.latest_step() == 1
    again.load(engine(), 1)


# Ends as a power cut would, once a state is whole.
CUT = """
import os, sys
from infra.launch.job import module_main
from pretrain import run
from pretrain.config import PretrainConfig
from pretrain.checkpoint.artifact import _SETTINGS_NOT_IN_SHAPES
from pretrain.checkpoint.manager import CheckpointManager

commit = CheckpointManager.commit

def cut(self):
    begun = self._writing is not None
    commit(self)
    if begun:
        os._exit(9)

CheckpointManager.commit = cut
module_main(PretrainConfig, run)
"""


def cut_short(settings: object, folder: Path, cache: Path) -> None:
    """Train until the first state is whole, with a cache of one's own."""
    folder.mkdir()
    (folder / "config.json").write_text(settings.model_dump_json())  # type: ignore[attr-defined]
    (folder / "cut.py").write_text(CUT)
    ended = subprocess.run(
        [sys.executable, str(folder / "cut.py"), str(folder)], env=os.environ | {"FOVEA_CACHE": str(cache)}, timeout=200
    )
    assert ended.returncode == 9


@pytest.mark.multiprocess
def test_a_training_goes_on_from_a_store_on_another_machine(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    changes = {"runtime": {**TINY["runtime"], "num_workers": 0}, "sharding": {"backend": "torch"}}
    run_module("pretrain", config(synthetic.seed, tmp_path / "whole", **changes))
    settings = config(synthetic.seed, tmp_path / "x", **changes)
    settings = settings.model_copy(update={"out": f"local://{tmp_path / 'store' / 'run'}"})
    cut_short(settings, tmp_path / "job", tmp_path / "cache")
    assert (tmp_path / "store" / "run" / "checkpoints").exists()
    run_module("pretrain", settings)
    ended = open_artifact(settings.out, "checkpoint")
    assert ended.metrics["resumed_at"] == 3
    assert losses(tmp_path / "store" / "run") == losses(tmp_path / "whole")
    assert not filesystem.is_folder(f"{settings.out}/checkpoints")
    names = {file.path: file.sha256 for file in open_artifact(str(tmp_path / "whole"), "checkpoint").manifest.files}
    assert {file.path: file.sha256 for file in ended.manifest.files} == names


def test_settings_that_shapes_do_not_show_are_keys_of_networks() -> None:
    """A name that no network has would compare nothing."""
    keys = set(VisionTransformerConfig.model_fields) | set(TimmNetworkConfig.model_fields)
    assert set(_SETTINGS_NOT_IN_SHAPES) <= keys
