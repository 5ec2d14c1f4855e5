"""The same stages on an S3-compatible server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from curation import run
from curation.config import CurateConfig, EmbedConfig, Exact, IngestConfig, MaterializeConfig, NearDuplicates
from curation.embed import embed
from curation.ingest.ingest import ingest
from curation.materialize import materialize
from infra.artifacts.artifact import verify
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from infra.storage import filesystem
from tests.conftest import image_folder, ingest_folder


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        S3FileSystem.clear_instance_cache()  # clients of another module's server
        files, _ = filesystem.connect("s3://fovea")
        files.makedirs("fovea", exist_ok=True)  # moto keeps its buckets for as long as the process lives
        yield "s3://fovea"
    server.stop()


def test_curation_from_bucket_to_bucket_equals_curation_on_disk(bucket: str, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 12, classes=2)
    (folder / "class0" / "copy.png").write_bytes((folder / "class1" / "0001.png").read_bytes())
    files, _ = filesystem.connect(bucket)
    files.put(str(folder), "fovea/images", recursive=True)
    results = []
    for source, root in ((str(folder), str(tmp_path / "run")), (f"{bucket}/images", f"{bucket}/run")):
        corpus = ingest(IngestConfig(source=source, out=f"{root}/corpus"))
        vectors = embed(EmbedConfig(corpus=corpus.url, out=f"{root}/embeddings"))
        selection = run(
            CurateConfig(
                steps=[Exact(), NearDuplicates(threshold=0.99)],
                corpus=corpus.url,
                embeddings=vectors.url,
                out=f"{root}/selection",
            )
        )
        smaller = materialize(MaterializeConfig(corpus=corpus.url, selection=selection.url, out=f"{root}/small"))
        assert verify(smaller) == []
        results.append([each.manifest.files for each in (corpus, vectors, selection, smaller)])
        opened = Corpus.open(smaller.url)
        assert len(opened) == 12
        assert opened.read_image(0).startswith(b"\x89PNG")
    assert results[0] == results[1]


def test_shards_in_a_bucket_are_read_in_place(bucket: str, tmp_path: Path) -> None:
    local = ingest_folder(image_folder(tmp_path / "images", 5), tmp_path / "corpus")
    filesystem.upload(Path(local.shard_url(0)), f"{bucket}/shards/000.tar")
    corpus = Corpus.open(ingest(IngestConfig(source=f"{bucket}/shards/*.tar", out=str(tmp_path / "remote"))).url)
    assert corpus.shards[0].url == f"{bucket}/shards/000.tar"
    assert [corpus.read_image(row) for row in range(5)] == [local.read_image(row) for row in range(5)]


def test_a_missing_bucket_is_named(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="s3://no-such-bucket/x: not found"):
        ingest(IngestConfig(source="s3://no-such-bucket/x", out=str(tmp_path / "o")))


def test_paths_join_and_absolute_parts_win() -> None:
    assert filesystem.join("s3://a/b/", "c", "d") == "s3://a/b/c/d"
    assert filesystem.join("runs/x", "/abs/y") == "/abs/y"
    assert filesystem.join("runs/x", "s3://b/y") == "s3://b/y"
