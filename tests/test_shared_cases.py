"""Small inputs on which users stumbled, made by the generators in ../shared/cases, with the right result of each."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

import pretrain
from flows.cli.main import main
from infra.corpus.corpus import Corpus
from infra.corpus.embeddings import Embeddings
from pretrain.data.decode import ImageRejected, decode_rgb, open_image, upright_size
from tests.conftest import SyntheticCorpora, ingest_folder
from tests.test_curation_ingest import rejected
from tests.test_distill import STUDENT
from tests.test_pretrain_training import TINY, config

Case = Callable[..., Path]
SHORT = {
    "schedule": {"steps": 2, "global_batch_size": 8},
    "sharding": {"backend": "torch"},
    "runtime": {"num_workers": 0},
}
TALL = {
    **SHORT,
    "model": {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 32, "image_size": 224},
    "views": {"global_crops": {"size": 64}, "local_crops": {"size": 32}, "num_local_crops": 1},
}


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Runs the generator of a number and returns the folder it wrote."""
    folder = Path(os.environ.get("FOVEA_CASES") or Path(__file__).parents[2] / "shared" / "cases")
    if not folder.is_dir():
        pytest.skip("no shared cases here: set FOVEA_CASES to their folder")

    def generate(number: int, *more: str) -> Path:
        (script,) = folder.glob(f"{number:02d}-*.py")
        out = tmp_path / f"case{number}"
        monkeypatch.setattr(sys, "argv", [script.name, str(out), *more])
        runpy.run_path(str(script))
        return out

    return generate


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends with; its exit code is 2."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("fovea: ")]
    return line


def test_01_dotted_keys(case: Case, tmp_path: Path) -> None:
    corpus = ingest_folder(case(1), tmp_path / "corpus")
    assert len(corpus) == len(set(corpus.keys)) == 14
    assert not rejected(corpus)
    assert len({corpus.read_image(row) for row in range(14)}) == 14


def test_02_beside_a_tar(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = case(2)
    message = failure(capsys, "ingest", "--source", str(folder), "--out", str(tmp_path / "corpus"))
    assert "holds shards (B.TAR) and loose images (e.jfif)" in message
    for name in ("e.jfif", "g.jpe"):
        (folder / name).unlink()
    corpus = ingest_folder(folder, tmp_path / "corpus")
    assert corpus.keys == ["b", "a"]
    containers = dict.fromkeys(["c.tar.bz2", "d.tar.xz"], "unsupported_container")
    assert rejected(corpus) == {**containers, "f": "outside_shards"}


def test_03_tar_links(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = case(3)
    corpus = ingest_folder(folder, tmp_path / "corpus")
    assert corpus.keys == ["a", "d"]
    assert rejected(corpus) == {"s.tar/b.jpg": "link", "s.tar/c.jpg": "link"}
    message = failure(capsys, "ingest", "--source", f"{folder}-all", "--out", str(tmp_path / "none"))
    assert "no usable image among 1 files: link 1 (s.tar/a.jpg)" in message


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """The S3 server that the generators write to."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=5577)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:5577")
        for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(f"AWS_{name}", value)
        S3FileSystem.clear_instance_cache()
        yield
    running.stop()
    S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("server")
def test_05_double_slashes_in_a_bucket(case: Case, tmp_path: Path) -> None:
    folder = case(5)
    corpus = ingest_folder("s3://bkt/abs", tmp_path / "abs")  # type: ignore[arg-type]
    secret = (folder / "secret.jpg").read_bytes()
    assert corpus.keys == ["ok"]
    assert list(rejected(corpus).values()) == ["not_an_image"]  # the object's own bytes are zeros
    assert all(corpus.read_image(row) != secret for row in range(len(corpus)))
    doubled = ingest_folder("s3://bkt/dbl", tmp_path / "dbl")  # type: ignore[arg-type]
    assert len(doubled) == 2
    assert not rejected(doubled)
    assert decode_rgb(doubled.read_image(0)).size == (24, 24)


@pytest.mark.usefixtures("server")
def test_07_folder_markers_in_a_bucket(case: Case, tmp_path: Path) -> None:
    case(7)
    corpus = ingest_folder("s3://bkt/marked", tmp_path / "corpus")  # type: ignore[arg-type]
    assert corpus.keys == ["cat/0", "dog/0"]
    assert corpus.classes == ["cat", "dog"]
    assert not rejected(corpus)


def test_09_unicode_names(case: Case, tmp_path: Path) -> None:
    corpus = ingest_folder(case(9), tmp_path / "corpus")
    assert len(corpus) == 11
    assert rejected(corpus) == {r"M\udcfcnchen.jpg": "unsafe_key"}


def test_11_underscore_extension(case: Case, tmp_path: Path) -> None:
    corpus = ingest_folder(case(11), tmp_path / "corpus")
    main(["embed", "--corpus", corpus.artifact.url, "--out", str(tmp_path / "vectors")])
    assert len(Embeddings.open(str(tmp_path / "vectors")).keys) == 2


def test_12_long_strip(case: Case, tmp_path: Path, synthetic: SyntheticCorpora) -> None:
    """Within the memory of any image: the strip must not be resized before it is cropped."""
    settings = config(synthetic.seed, tmp_path / "teacher", **TALL)
    checkpoint = pretrain.run(settings).url
    corpus = ingest_folder(case(12), tmp_path / "corpus")
    program = (
        "import resource, sys; from flows.cli.main import main\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (9 << 30), used + (9 << 30)))\n"
        "main(sys.argv[1:])"
    )
    flags = ["--backbone.kind", "checkpoint", "--backbone.url", checkpoint, "--out", str(tmp_path / "vectors")]
    command = [sys.executable, "-c", program, "embed", "--corpus", corpus.artifact.url, *flags]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert len(Embeddings.open(str(tmp_path / "vectors")).keys) == 2


def test_13_truncated_unseen(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = str(tmp_path / "corpus")
    main(["ingest", "--check", "header", "--source", str(case(13)), "--out", corpus])
    main(["embed", "--corpus", corpus, "--out", str(tmp_path / "vectors")])
    vectors = Embeddings.open(str(tmp_path / "vectors"))
    assert vectors.undecodable == {0: "truncated"}
    assert vectors.artifact.metrics["undecodable"] == 1
    steps = tmp_path / "steps.yaml"
    steps.write_text("steps: [{kind: near_duplicates, threshold: 0.999}]")
    inputs = ["--corpus", corpus, "--embeddings", str(tmp_path / "vectors")]
    main(["curate", str(steps), *inputs, "--out", str(tmp_path / "selection")])
    selection = pq.read_table(tmp_path / "selection" / "selection.parquet").to_pylist()
    assert (selection[0]["keep"], selection[0]["reason"]) == (False, "truncated")
    assert sum(row["keep"] for row in selection) == 19


def test_14_orientation(case: Case, tmp_path: Path) -> None:
    folder = case(14)
    for path in folder.iterdir():
        data = path.read_bytes()
        upright = (400, 200) if path.name == "exif99.jpg" else (200, 400)
        assert upright_size(open_image(data)) == decode_rgb(data).size == upright
    sizes = []
    for check in ("pixels", "header"):
        corpus = ingest_folder(folder, tmp_path / check, check=check)
        sizes.append(corpus.table.select(["key", "width", "height"]).to_pylist())
    assert sizes[0] == sizes[1]


def test_15_deep_gray(case: Case, tmp_path: Path) -> None:
    known = {"08bit.png", "16bit.png", "white_is_zero_16.tif", "white_is_zero_8.tif"}
    folder = case(15)
    for path in folder.iterdir():
        if path.name in known:
            assert_ramp(np.asarray(decode_rgb(path.read_bytes())))
        else:
            with pytest.raises(ImageRejected, match="unknown_depth"):
                decode_rgb(path.read_bytes())
    for name, settings in {
        "12bit_in_16.png": {"bit_depth": 12},
        "10bit_in_16.png": {"bit_depth": 10},
        "int32.tif": {"window": (0, 255_000)},
        "float.tif": {"window": (0, 1)},
        "float_nan.tif": {"window": (0, 1)},
        "float_hounsfield.tif": {"window": (-1000, 1000)},
    }.items():
        source = tmp_path / name.replace(".", "-")
        source.mkdir()
        (source / name).write_bytes((folder / name).read_bytes())
        corpus = ingest_folder(source, tmp_path / f"corpus-{source.name}", **settings)
        main(["embed", "--corpus", corpus.artifact.url, "--out", str(tmp_path / f"vectors-{source.name}")])
        assert not Embeddings.open(str(tmp_path / f"vectors-{source.name}")).undecodable


def assert_ramp(pixels: np.ndarray) -> None:
    assert pixels.mean() == pytest.approx(127.5, abs=1)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert pixels[:, 0].max() == 0


def test_16_color_key(case: Case) -> None:
    for path in case(16).iterdir():
        assert (np.asarray(decode_rgb(path.read_bytes()))[:, 0] == 255).all()


def test_18_ico_bomb(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = (case(18, "9000") / "favicon.ico").read_bytes()
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageRejected, match="too_many_pixels"):
        decode_rgb(data, max_pixels=80_000_000)


@pytest.mark.parametrize("kind", ["right", "exif"])
def test_19_masks_of_turned_images(
    case: Case, tmp_path: Path, synthetic: SyntheticCorpora, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder, suite = case(19), tmp_path / "suite.yaml"
    suite.write_text("tasks: [{kind: segmentation, train: st, test: se, grid: 4}]")
    checkpoint = pretrain.run(config(synthetic.seed, tmp_path / "teacher", **SHORT)).url
    flags: list[str] = []
    for name, split in (("st", "train"), ("se", "test")):
        flags += [f"--datasets.{name}", f"pairs:{folder}/{kind}/{split}/img:{folder}/{kind}/{split}/map"]
    arguments = ["eval", checkpoint, str(suite), *flags, "--out", str(tmp_path / "report")]
    if kind == "right":
        main([*arguments])
        return
    assert "the map is 64x32, the image 32x64 as EXIF turns it" in failure(capsys, *arguments)


def test_21_cls_values(case: Case, tmp_path: Path) -> None:
    corpus = ingest_folder(case(21), tmp_path / "corpus")
    assert corpus.table["label"].to_pylist() == [0, 1, None, None, None, None, None]
    assert rejected(corpus) == {f"s.tar/{i}.cls": "label_not_a_number" for i in range(2, 7)}


def test_22_stray_image(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["ingest", "--source", str(case(22)), "--out", str(tmp_path / "corpus")])
    corpus = Corpus.open(str(tmp_path / "corpus"))
    assert corpus.classes == ["cat", "dog"]
    assert sorted(corpus.table["label"].to_pylist(), key=str) == [0, 0, 0, 1, 1, 1, None]
    assert "1 of 7 images has no class (cover.jpg)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("zip", "unsupported_container 1 (train.zip)"),
        ("gzip_named_tar", "compressed_tar 1 (s.tar)"),
        ("parquet", "unsupported_container 1 (00000.parquet)"),
        ("hidden", "hidden 1 (.a.jpg)"),
    ],
)
def test_23_other_containers(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, named: str
) -> None:
    folder = case(23)
    assert named in failure(capsys, "ingest", "--source", str(folder / name), "--out", str(tmp_path / "corpus"))
    assert ingest_folder(folder / "upper", tmp_path / "upper").keys == ["a"]


def test_24_climbing_names(case: Case, tmp_path: Path) -> None:
    corpus = ingest_folder(case(24), tmp_path / "corpus")
    assert corpus.keys == ["abs/a", "e"]
    climbing = ("../up/b.jpg", "../../c.jpg", "ok/../d.jpg", "../e.jpg")
    assert rejected(corpus) == {f"s.tar/{name}": "unsafe_key" for name in climbing}


def test_26_class_names(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = case(26)
    quick = ["eval", "pixels", "quick", "--datasets.train", str(folder / "train")]
    for name, message in {
        "lack": "test lacks the class dog of train; ingest both the same way",
        "unlabelled": "test has no labels; give class folders, or shards with .cls members",
    }.items():
        out = ["--datasets.test", str(folder / name), "--out", str(tmp_path / name / "{id}")]
        assert message in failure(capsys, *quick, *out)
    main([*quick, "--datasets.test", str(folder / "test"), "--out", str(tmp_path / "test" / "{id}")])


def test_27_no_home(case: Case, tmp_path: Path) -> None:
    """Prefect works in the cache folder where nothing can be written at home; with neither, one line says so."""
    folder = case(27)
    content = yaml.safe_load((folder / "p.yaml").read_text())
    content["synthetic"] = content.pop("embedded")  # the case was written before the key had this name
    quick = {"tasks": [{"kind": "knn", "k": [1]}], "pictures": 0}
    (folder / "p.yaml").write_text(yaml.safe_dump({**content, "pretrain": TINY, "distill": STUDENT, "evaluate": quick}))
    environment = {**os.environ, "HOME": "/dev/null", "FOVEA_CACHE": str(tmp_path / "cache")}
    environment.pop("PREFECT_HOME", None)
    environment.pop("XDG_CACHE_HOME", None)

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        fovea = [sys.executable, "-m", "flows.cli.main", *words]
        return subprocess.run(fovea, cwd=folder, env=environment, capture_output=True, text=True)

    done = command("run", "p.yaml")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cache" / "prefect").is_dir()

    environment["FOVEA_CACHE"] = "/dev/null/cache"
    done = command("run", "p.yaml", "--root", "other")
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("fovea: ")]
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "/dev/null/cache" in line
    done = command("doctor", "--json")
    assert done.returncode == 1
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert found["prefect"]["status"] == found["cache"]["status"] == "fail"
    assert "/dev/null/cache" in found["prefect"]["message"]
