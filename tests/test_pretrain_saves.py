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

from infra import storage
from infra.artifacts import open_artifact
from infra.errors import UserError
from infra.launch.run import run_module
from pretrain.config import Retention
from pretrain.saves import TRAINING, Saves, Tally
from pretrain.sharding import state
from pretrain.sharding.plain import TorchEngine
from tests.conftest import Embedded
from tests.test_pretrain_training import TINY, config, losses

places = pytest.mark.parametrize("remote", [False, True], ids=["folder", "store"])


def place(tmp_path: Path, remote: bool) -> tuple[Path, str]:
    """Work directory and URL; `local://` is no local path to Fovea, so it stands for an object store."""
    if not remote:
        return tmp_path / "run", str(tmp_path / "run")
    (tmp_path / "store").mkdir(exist_ok=True)
    return tmp_path / "work", f"local://{tmp_path / 'store'}"


def engine() -> TorchEngine:
    module = nn.Linear(3, 2)
    return TorchEngine(module, torch.optim.AdamW(module.parameters()))


def saved(saves: Saves, trained: TorchEngine, step: int) -> None:
    trained.backward(trained.forward(torch.ones(1, 3)).sum())
    trained.step()
    rows = [{"step": float(number), "loss": 1.0} for number in range(step)]
    saves.begin(trained, step, rows, Tally(samples=8 * step))
    saves.settle()


@places
def test_a_saved_state_comes_back(tmp_path: Path, remote: bool) -> None:
    work, url = place(tmp_path, remote)
    trained = engine()
    saved(Saves(work, url, Retention()), trained, 3)
    other, saves = engine(), Saves(work, url, Retention())
    assert saves.newest() == 3
    rows, tally = saves.load(other, 3)
    assert (len(rows), tally) == (3, Tally(samples=24))
    assert all(torch.equal(a, b) for a, b in zip(other.module.parameters(), trained.module.parameters(), strict=True))
    for parameter, same in zip(other.module.parameters(), trained.module.parameters(), strict=True):
        assert torch.equal(other.moment(parameter, "exp_avg"), trained.moment(same, "exp_avg"))
    saves.revise(3, Tally(24, rewinds=1))
    assert saves.load(other, 3)[1].rewinds == 1
    saves.keep(3)
    assert sorted(path.name for path in (work / TRAINING).iterdir()) == [
        "metrics.jsonl",
        "state-00000.safetensors",
        "state.json",
        "tally.json",
    ]
    assert Saves(work, url, Retention()).newest() == 3


@places
def test_the_last_few_and_the_young_stay(tmp_path: Path, remote: bool) -> None:
    trained, (work, url) = engine(), place(tmp_path, remote)
    few, folder = Saves(work, url, Retention(latest=2)), Path(url.removeprefix("local://")) / "steps"
    for step in (1, 2, 3, 10):
        saved(few, trained, step)
    assert {path.name for path in folder.iterdir()} == {"3", "10"}
    aged = Saves(work, url, Retention(hours=1))
    os.utime(folder / "3" / "tally.json", (0, 0))
    saved(aged, trained, 11)
    assert {path.name for path in folder.iterdir()} == {"10", "11"}


@places
def test_half_a_state_is_none(tmp_path: Path, remote: bool) -> None:
    work, url = place(tmp_path, remote)
    saves, folder = Saves(work, url, Retention(latest=3)), Path(url.removeprefix("local://")) / "steps"
    for step in (2, 4):
        saved(saves, engine(), step)
    (folder / "4" / "tally.json").unlink()
    assert Saves(work, url, Retention()).newest() == 2
    assert not (folder / "4").exists()


def test_a_full_disk_harms_no_earlier_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves, trained = Saves(tmp_path, str(tmp_path), Retention()), engine()
    saved(saves, trained, 1)

    def full(part: state.Part, folder: Path) -> list[Path]:
        (folder / "state.json").write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state, "write", full)
    with pytest.raises(UserError, match="No space left on device; the last whole"):
        saved(saves, trained, 2)
    again = Saves(tmp_path, str(tmp_path), Retention())
    assert again.newest() == 1
    again.load(engine(), 1)


# Ends as a power cut would, once a state is whole.
CUT = """
import os, sys
from infra.launch.job import module_main
from pretrain import run
from pretrain.config import PretrainConfig
from pretrain.saves import Saves

commit = Saves.commit

def cut(self):
    begun = self._writing is not None
    commit(self)
    if begun:
        os._exit(9)

Saves.commit = cut
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
def test_a_training_goes_on_from_a_store_on_another_machine(embedded: Embedded, tmp_path: Path) -> None:
    changes = {"runtime": {**TINY["runtime"], "num_workers": 0}, "sharding": {"backend": "torch"}}
    run_module("pretrain", config(embedded.seed, tmp_path / "whole", **changes))
    settings = config(embedded.seed, tmp_path / "x", **changes)
    settings = settings.model_copy(update={"out": f"local://{tmp_path / 'store' / 'run'}"})
    cut_short(settings, tmp_path / "job", tmp_path / "cache")
    assert (tmp_path / "store" / "run" / "steps").exists()
    run_module("pretrain", settings)
    ended = open_artifact(settings.out, "checkpoint")
    assert ended.metrics["resumed_at"] == 3
    assert losses(tmp_path / "store" / "run") == losses(tmp_path / "whole")
    assert not storage.is_folder(f"{settings.out}/steps")
    names = {file.path: file.sha256 for file in open_artifact(str(tmp_path / "whole"), "checkpoint").manifest.files}
    assert {file.path: file.sha256 for file in ended.manifest.files} == names
