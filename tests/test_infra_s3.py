"""Data from a real S3 server, over a network that fails: the same samples, and no secret anywhere."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from s3fs import S3FileSystem

from curation.config import IngestConfig
from curation.ingest.ingest import ingest
from infra.artifacts.artifact import open_artifact, verify
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from infra.storage import filesystem, range_reader
from pretrain.config import PretrainSettings
from pretrain.data.loader import Batch, RankBatchSampler, batches
from pretrain.monitoring import metrics_log
from pretrain.monitoring.metrics_log import METRICS
from pretrain.train import build_view_dataset
from tests.conftest import SyntheticCorpora, encode_image
from tests.faulty_proxy import Faults, faulty
from tests.ranks import run_module
from tests.s3_server import S3Server, missing, serving
from tests.test_pretrain_checkpoints import cut_short
from tests.test_pretrain_training import TINY, config, losses

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(missing()), reason=f"no S3 server here: install Debian's ceph ({', '.join(missing())})"),
]

SHARDS, EACH = 6, 40
FAULTS = Faults(error_500=0.025, error_503=0.025, drop=0.02, truncate=0.02, stall=0.01, seed=1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serving(tmp_path_factory.mktemp("s3") / "ceph") as found, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", found.access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", found.secret_key)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        with reached_by(found.endpoint):
            files, _ = filesystem.connect("s3://photographs")
            files.mkdir("photographs")
            for number in range(SHARDS):
                files.pipe_file(f"photographs/shards/{number:03d}.tar", shard(number))
        yield found


@contextmanager
def reached_by(endpoint: str) -> Iterator[None]:
    """Talk to the server at an address; clients made for another one are forgotten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        S3FileSystem.clear_instance_cache()
        yield
    S3FileSystem.clear_instance_cache()


def shard(number: int) -> bytes:
    """Noise, which no format makes small, so that shards have many blocks."""
    buffer = io.BytesIO()
    rng = np.random.default_rng(number)
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for at in range(EACH):
            data = encode_image(_noise(rng), "PNG")
            entry = tarfile.TarInfo(f"{number:03d}-{at:04d}.png")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _noise(rng: np.random.Generator):  # type: ignore[no-untyped-def]
    from PIL import Image

    return Image.fromarray(rng.integers(0, 256, (160, 160, 3), dtype=np.uint8))


def settings(**runtime: object) -> PretrainSettings:
    return PretrainSettings.model_validate(
        {
            "model": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 32},
            "views": {"global_crops": {"size": 32}, "local_crops": {"size": 16}, "num_local_crops": 1},
            "sampling": {"shuffle": "shard_window", "window_shards": 2},
            "runtime": {"num_workers": 2, **runtime},
        }
    )


def epoch(corpus: str, workers: int = 2, **runtime: object) -> list[Batch]:
    dataset = build_view_dataset([corpus], settings(**runtime))
    return list(batches(dataset, RankBatchSampler(0, 1, 24, 1, 0, SHARDS * EACH // 24), workers))


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(first, second, strict=True) for name in vars(a)
    )


@pytest.fixture(scope="module")
def indexed(server: S3Server) -> str:
    """A corpus in the bucket whose shards stay where they are."""
    with reached_by(server.endpoint):
        return ingest(IngestConfig(source="s3://photographs/shards", out="s3://photographs/corpus")).url


@pytest.mark.multiprocess
@pytest.mark.parametrize("cache_gb", [0.0, 0.1])
def test_an_epoch_over_a_failing_network_has_the_same_samples(
    server: S3Server, indexed: str, cache_gb: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOVEA_CACHE", str(tmp_path))
    with reached_by(server.endpoint):
        expected = epoch(indexed, workers=0)
    with faulty(server.endpoint, FAULTS) as proxy, reached_by(proxy.endpoint):
        found = epoch(indexed, cache_gb=cache_gb)
    assert same(found, expected)
    assert sum(int(batch.skipped_counts.sum()) for batch in found) == 0
    assert sorted(place for batch in found for place in batch.positions.tolist()) == list(range(SHARDS * EACH))
    assert (tmp_path / "blocks").exists() == (cache_gb > 0)
    assert cache_gb or all(proxy.counts[kind] for kind in ("error_500", "error_503", "drop", "truncate", "stall"))


@pytest.mark.multiprocess
def test_a_cache_that_holds_all_is_all_that_is_read(
    server: S3Server, indexed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOVEA_CACHE", str(tmp_path))
    with faulty(server.endpoint, Faults()) as proxy, reached_by(proxy.endpoint):
        first = epoch(indexed, cache_gb=1)
        before = proxy.counts["passed"]
        assert same(epoch(indexed, cache_gb=1), first)
        assert proxy.counts["passed"] - before <= 10  # manifest, list of shards, how images are decoded


def test_ingest_over_a_failing_network_makes_the_same_corpus(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_reader, "_PIECE", 100_000)
    artifacts = []
    with faulty(server.endpoint, FAULTS) as proxy:
        for name, endpoint in (("direct", server.endpoint), ("faulty", proxy.endpoint)):
            monkeypatch.setenv("FOVEA_CACHE", str(tmp_path / name))
            with reached_by(endpoint):
                source, out = "s3://photographs/shards/{000..003}.tar", f"s3://photographs/{name}"
                artifacts.append(ingest(IngestConfig(source=source, out=out, workers=1)))
    assert artifacts[0].manifest.files == artifacts[1].manifest.files
    assert proxy.counts.total() > proxy.counts["passed"] > 0


def test_a_shard_written_anew_is_noticed(server: S3Server, tmp_path: Path) -> None:
    with reached_by(server.endpoint):
        files, _ = filesystem.connect("s3://photographs")
        files.pipe_file("photographs/stale/000.tar", shard(7))
        corpus = ingest(IngestConfig(source="s3://photographs/stale", out=str(tmp_path / "corpus"))).url
        files.pipe_file("photographs/stale/000.tar", shard(8))
        with pytest.raises(UserError, match=r"000\.tar: sample 007-0003 changed after ingest"):
            Corpus.open(corpus).read_image(3)
        files.pipe_file("photographs/stale/000.tar", shard(7)[:200_000])
        with pytest.raises(UserError, match="changed after ingest"):
            Corpus.open(corpus).read_image(30)
        assert len(Corpus.open(corpus).read_image(1)) > 70_000


def test_a_wrong_secret_is_reported_and_never_shown(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with reached_by(server.endpoint), pytest.raises(UserError, match="access denied") as caught:
        Corpus.open("s3://photographs/corpus")
    assert "not-the-secret" not in str(caught.value)


def test_no_artifact_holds_a_credential(server: S3Server, indexed: str) -> None:
    with reached_by(server.endpoint):
        artifact = Corpus.open(indexed).artifact
        assert verify(artifact) == []
        texts = [artifact.read_bytes(file.path) for file in artifact.manifest.files]
        texts.append(artifact.manifest.model_dump_json().encode())
    assert not any(secret.encode() in text for text in texts for secret in (server.access_key, server.secret_key))


@pytest.mark.multiprocess
def test_a_training_goes_on_from_a_bucket_on_another_machine(
    server: S3Server, synthetic: SyntheticCorpora, tmp_path: Path
) -> None:
    """Its states lie in the bucket, and go when the checkpoint is whole."""
    with reached_by(server.endpoint):
        changes = {"runtime": {**TINY["runtime"], "num_workers": 0}, "sharding": {"backend": "torch"}}
        run_module("pretrain", config(synthetic.seed, tmp_path / "whole", **changes))
        settings = config(synthetic.seed, tmp_path, **changes).model_copy(update={"out": "s3://photographs/run"})
        cut_short(settings, tmp_path / "job", tmp_path / "cache")
        assert any(
            name.endswith("train_state.json") for name in filesystem.list_files("s3://photographs/run/checkpoints")
        )
        run_module("pretrain", settings)
        found = open_artifact("s3://photographs/run", "checkpoint")
        assert found.metrics["resumed_at"] == 3
        assert metrics_log.parse_rows(found.read_bytes(METRICS).decode()) == losses(tmp_path / "whole")
        assert not filesystem.is_folder("s3://photographs/run/checkpoints")
        assert not verify(found)
