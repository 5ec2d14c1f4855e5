"""CPU-seconds before a user sees something: first lines, mistakes, artifacts that exist, packing. Peer: the budget."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import yaml
from PIL import Image

from benchmarks.report import Row, main

_REPEATS = 3
_FOVEA = [sys.executable, "-m", "flows.cli"]
_PIPELINE = {
    "synthetic": {"pool_per_class": 8, "seed_per_class": 8, "test_per_class": 8, "leaks": 20, "near_copies": 20},
    "pretrain": {
        "model": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 32},
        "views": {"global_crops": {"size": 32}, "local_crops": {"size": 16}, "num_local_crops": 1},
        "schedule": {"steps": 2, "global_batch_size": 8},
        "sharding": {"backend": "torch"},
        "runtime": {"num_workers": 0},
    },
    "distill": {
        "students": {
            "tiny": {"model": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 32}}
        },
        "schedule": {"steps": 2, "global_batch_size": 8},
        "sharding": {"backend": "torch"},
        "runtime": {"num_workers": 0},
    },
    "evaluate": {"tasks": [{"kind": "knn"}]},
    "publish": {"formats": ["timm"]},
}


def measure() -> list[Row]:
    """Rows of all commands; on another day's machine compare with the cost of importing torch, the last row."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _write_images(folder / "images", 800)
        ingest = [*_FOVEA, "ingest", "--source", str(folder / "images"), "--out"]
        packed = statistics.median(_packed(ingest, folder, number) for number in range(_REPEATS))
        corpus, out = str(folder / "corpus0"), str(folder / "nothing")
        pretrain = [*_FOVEA, "pretrain", "tiny_cpu", "--corpora", corpus, "--out", out]
        pipeline = folder / "pipeline.yaml"
        pipeline.write_text(yaml.safe_dump({"root": str(folder / "run"), **_PIPELINE}))
        subprocess.run([*_FOVEA, "run", str(pipeline)], check=True, capture_output=True)
        return [
            _row("first line of fovea --help", _first_line([*_FOVEA, "--help"]), 1.0),
            _row("first line of fovea pretrain", _first_line(pretrain), 1.0),
            _row("first line of fovea eval", _first_line([*_FOVEA, "eval", "pixels", "--datasets.test", corpus]), 1.0),
            _row("first line of fovea run", _first_line([*_FOVEA, "run", str(pipeline)]), 1.0),
            _row("a missing corpus", _repeated([*_FOVEA, "embed", "--corpus", out, "--out", out], 2), 3.0),
            _row("a finished pipeline again", _repeated([*_FOVEA, "run", str(pipeline)]), 15.0),
            _row("packing 800 images", packed, 2.0),
            Row("import torch", _repeated([sys.executable, "-c", "import torch"]), "CPU s"),
        ]


def _row(name: str, value: float, budget: float) -> Row:
    return Row(name, value, "CPU s", budget, budget / value, 1.0)


def _write_images(folder: Path, count: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((64, 64)).save(folder / f"{number:04d}.jpg")


def _repeated(command: Sequence[str], code: int = 0) -> float:
    return statistics.median(_cpu(command, code) for _ in range(_REPEATS))


def _packed(ingest: Sequence[str], folder: Path, number: int) -> float:
    """CPU-seconds of an ingest that finds nothing of earlier ones."""
    os.environ["FOVEA_CACHE"] = str(folder / f"cache{number}")
    return _cpu([*ingest, str(folder / f"corpus{number}")])


def _cpu(command: Sequence[str], code: int = 0) -> float:
    """CPU-seconds of a command and its processes, to the end."""
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def _first_line(command: Sequence[str]) -> float:
    """CPU-seconds until a command has printed its first line, on either stream."""
    return statistics.median(_until_first_line(command) for _ in range(_REPEATS))


def _until_first_line(command: Sequence[str]) -> float:
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout.readline()
        taken = process.cpu_times()
        return float(taken.user + taken.system)
    finally:
        process.kill()
        process.wait()
        time.sleep(0.1)


if __name__ == "__main__":
    main("Startup", measure)
