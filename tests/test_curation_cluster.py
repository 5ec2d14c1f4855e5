"""The same answers on a real Ray cluster of two nodes, also when one of them dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from curation import run
from curation.config import CurateConfig, EmbedConfig
from curation.embed import embed
from infra.compute.ray_cluster import RayCluster
from infra.corpus.selection import Selection
from infra.errors import UserError
from tests.conftest import image_folder, ingest_folder
from tests.pools import halved, planted, pool

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'fovea[ray]'")
RAY = str(Path(sys.executable).with_name("ray"))
STEPS = [
    {"kind": "near_duplicates", "threshold": 0.7, "num_cells": 60, "allow_chains": True},
    {"kind": "decontaminate", "threshold": 0.6, "num_cells": 40, "drop": "components"},
    {"kind": "semdedup", "clusters": 20},
    {"kind": "balance", "levels": [40, 8], "target": 900},
]


class Nodes:
    """Two Ray nodes on this machine, of one core each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, []
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
        head = ["--head", "--port=0", f"--temp-dir={folder}", "--include-dashboard=false", "--disable-usage-stats"]
        self._start(head, environment)
        self.address = (folder / "ray_current_cluster").read_text().strip()
        self.second = self._start([f"--address={self.address}"], environment)

    def _start(self, arguments: list[str], environment: dict[str, str]) -> list[psutil.Process]:
        before = set(psutil.pids())
        command = [RAY, "start", *arguments, "--num-cpus=1", "--object-store-memory=80000000"]
        done = subprocess.run(
            command, env=environment | {"RAY_TMPDIR": str(self.folder)}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        new = [psutil.Process(pid) for pid in set(psutil.pids()) - before if psutil.pid_exists(pid)]
        mine = [each for each in new if _is_ray(each)]
        self.started += mine
        return mine

    def kill_second(self) -> None:
        for process in self.second:
            _kill(process)

    def stop(self) -> None:
        for process in reversed(self.started):
            _kill(process)


def _is_ray(process: psutil.Process) -> bool:
    try:
        return "ray" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    try:
        for child in process.children(recursive=True):
            child.send_signal(signal.SIGKILL)
        process.kill()
    except psutil.NoSuchProcess:
        pass


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    found = Nodes(Path("/tmp") / f"fovea-ray-{os.getpid()}")  # sockets' paths must be short
    try:
        yield found
    finally:
        ray.shutdown()
        found.stop()
        shutil.rmtree(found.folder, ignore_errors=True)


@pytest.mark.cluster
@pytest.mark.multiprocess
@pytest.mark.timeout(120)
def test_no_cluster_is_one_line() -> None:
    with pytest.raises(UserError, match="no cluster answers"):
        list(RayCluster("127.0.0.1:9").map(np.sqrt, range(3)))


@pytest.mark.cluster
@pytest.mark.multiprocess
@pytest.mark.timeout(300)
def test_two_nodes_give_the_same_answers_also_when_one_dies(nodes: Nodes, tmp_path: Path) -> None:
    vectors = planted(3, 4000, 24, concepts=30)
    target = pool(tmp_path, vectors)
    test = pool(tmp_path, halved(vectors[::100].astype(float) + 0.05), "t")
    config = CurateConfig(
        corpus=target.corpus,
        embeddings=target.embeddings,
        eval_embeddings=[str(test.embeddings)],
        steps=STEPS,
        out=str(tmp_path / "here"),
    )
    here = Selection.open(run(config).url)
    there = Selection.open(run(config.model_copy(update={"ray": nodes.address, "out": str(tmp_path / "there")})).url)
    assert here.artifact.id == there.artifact.id
    np.testing.assert_equal(here.ledger.to_pylist(), there.ledger.to_pylist())

    source = ingest_folder(image_folder(tmp_path / "images", 40), tmp_path / "corpus").artifact.url
    embedding = EmbedConfig(corpus=source, out=str(tmp_path / "va"))
    alone, apart = (
        embed(embedding),
        embed(embedding.model_copy(update={"ray": nodes.address, "out": tmp_path.as_posix() + "/vb"})),
    )
    assert [file.sha256 for file in alone.manifest.files] == [file.sha256 for file in apart.manifest.files]

    cluster = RayCluster(nodes.address)
    places = set(cluster.map(_place, range(20), together=1))
    assert len(places) == 2, "one of the nodes did nothing"
    found = []
    for number, result in enumerate(cluster.map(_slow_square, range(20), together=1)):
        found.append(result)
        if number == 5:
            nodes.kill_second()
    assert found == [number**2 for number in range(20)]

    def mistaken(number: int) -> int:
        raise UserError(f"{number}: a mistake")

    with pytest.raises(UserError, match="0: a mistake"):
        list(cluster.map(mistaken, range(3)))


def _place(number: int) -> str:
    time.sleep(0.2)
    return str(ray.get_runtime_context().get_node_id())


def _slow_square(number: int) -> int:
    time.sleep(0.2)
    return number**2
