"""The documentation is run: every console block as written, the demo from an installed wheel, the Python blocks."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.conftest import encode_image, picture
from tests.console_blocks import Block, blocks, missing, pages
from tests.test_rooms import ROOMS

ROOT = Path(__file__).parents[1]
PAGES = list(pages(ROOT))
FOVEA = Path(sys.executable).with_name("fovea")
PORT = 5578  # of the S3 server: pages of one worker are run one after another

SHIM = """\
#!{python}
import os, sys
words = sys.argv[1:]
if words and words[0] in ("pretrain", "distill") and "--help" not in words:
    while "--schedule.steps" in words:
        place = words.index("--schedule.steps")
        del words[place:place + 2]
    words += ["--schedule.steps", "3", "--schedule.global-batch-size", "8", "--optimizer.warmup-steps", "1"]
if words and words[0] == "run" and "--help" not in words:
    for stage in ("pretrain", "distill"):
        words += [f"--{{stage}}.schedule.steps", "3", f"--{{stage}}.schedule.global_batch_size", "8"]
        words += [f"--{{stage}}.optimizer.warmup-steps", "1"]
os.execv("{fovea}", ["fovea", *words])
"""


@pytest.fixture
def folder(tmp_path: Path, prefect_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh folder with what the pages' readers are said to have: photographs, labeled images, shards in a bucket."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "fovea").write_text(SHIM.format(python=sys.executable, fovea=FOVEA))
    (tools / "fovea").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PREFECT_HOME", str(prefect_home))
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{PORT}")
    here = tmp_path / "here"
    write_photographs(here / "photos", 40)
    for number in range(96):
        write_photographs(here / "labeled" / ("train", "test")[number % 2] / f"class-{number % 3}", 1, 100 + number)
    (here / "laion").mkdir()
    (here / "laion" / "00000.tar").write_bytes(shard(200, captions=True))
    (here / "laion" / "00000_stats.json").write_text("{}")
    server = ThreadedMotoServer("127.0.0.1", PORT, verbose=False)
    server.start()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    for number in range(10):
        client.put_object(Bucket="bucket", Key=f"shards/{number:03d}.tar", Body=shard(300 + 4 * number))
    yield here
    server.stop()


def write_photographs(target: Path, count: int, first: int = 0) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (target / f"photo-{number:03d}.jpg").write_bytes(encode_image(picture(number, (96, 72)), "JPEG", quality=92))


def shard(first: int, captions: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(first, first + 4):
            members = {"jpg": encode_image(picture(number, (96, 72)), "JPEG")}
            if captions:
                members |= {"txt": f"picture {number}".encode(), "json": json.dumps({"caption": number}).encode()}
            for extension, data in members.items():
                entry = tarfile.TarInfo(f"{number:09d}.{extension}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def run(command: str, folder: Path) -> str:
    """Standard output and error of a command of a page."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}"
    assert "Traceback" not in done.stdout, f"$ {command}\n{done.stdout}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_console_block_runs_as_written(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.not_run is None:
            printed = "".join(run(command, folder) for command in block.commands)
            assert not missing(block.output, printed), printed


def test_blocks_that_are_not_run_say_why() -> None:
    """A block without a mark is run; a mark without a reason does not count."""
    marked = [block for page in PAGES for block in blocks(page) if block.not_run is not None]
    assert all(len(str(block.not_run).split()) > 1 for block in marked)
    assert len(marked) < sum(len(blocks(page)) for page in PAGES)


def demo() -> Block:
    (found,) = [each for each in blocks(ROOT / "README.md") if any("make demo" in line for line in each.commands)]
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The command of a wheel that is installed into an environment of its own, without the development extras."""
    root = tmp_path_factory.mktemp("installed")
    for name in (*ROOMS, "pyproject.toml", "README.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / "source" / name)
    uv, python = (str(Path(sys.executable).with_name(name)) for name in ("uv", "python"))
    build = ["build", "--quiet", "--wheel", "--no-build-isolation", "--python", python, "--out-dir", str(root)]
    subprocess.run([uv, *build, str(root / "source")], check=True)
    subprocess.run([uv, "venv", "--quiet", "--python", python, str(root / "venv")], check=True)
    (wheel,) = root.glob("*.whl")
    install = [
        "pip",
        "install",
        "--quiet",
        "--python",
        str(root / "venv"),
        "--constraint",
        str(ROOT / "constraints.txt"),
    ]
    subprocess.run([uv, *install, str(wheel)], check=True)
    yield root / "venv" / "bin" / "fovea"
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(900)
def test_the_installed_demo_prints_what_the_readme_shows(
    installed: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (folder.parent / "tools" / "fovea").write_text(SHIM.format(python=sys.executable, fovea=installed))
    assert "tasks:" in run("fovea recipes quick", folder)
    assert "sources:" in run("fovea init mine.yaml && fovea run mine.yaml --print-config", folder)
    printed = run("fovea run demo --root runs/demo", folder)
    verdicts = [line for line in demo().output if "baselines" in line]
    assert len(verdicts) == 3
    assert printed.count("No better than its baselines: knn") == 3  # three steps teach nothing
    assert not missing([line for line in demo().output if line not in verdicts], printed), printed


@pytest.mark.slow
def test_the_python_blocks_run(folder: Path) -> None:
    text = (ROOT / "docs" / "python.md").read_text()
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("mkdocs")), "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "pretrain.html").is_file()
