"""Shared by the tests: tiny corpora with known truth, and the real image sets where they are present."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation.config import IngestConfig, SyntheticSettings
from curation.ingest.ingest import ingest
from curation.synthetic.corpus import TRUTH, generate
from flows.cli.main import main
from infra.corpus.corpus import Corpus
from pretrain.backbones.config import OpenClipBackboneConfig

SMALL = SyntheticSettings(
    pool_per_class=12,
    seed_per_class=10,
    test_per_class=6,
    flat=10,
    noise=10,
    exact_copies=20,
    near_copies=30,
    leaks=20,
    broken=10,
)


@dataclass(frozen=True)
class SyntheticCorpora:
    """The synthetic corpus, small, ingested."""

    folder: Path
    pool: str
    seed: str
    test: str

    @property
    def truth(self) -> Path:
        return self.folder / TRUTH


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of a test stays in the user's cache, or comes from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCorpora:
    root = tmp_path_factory.mktemp("synthetic")
    folder = generate(SMALL, root)
    urls = {
        role: ingest(IngestConfig(source=str(folder / role), out=str(root / "corpora" / "{id}"))).url
        for role in ("pool", "seed", "test")
    }
    return SyntheticCorpora(folder, **urls)


def pytest_configure() -> None:
    """Let children receive Ctrl-C: a shell that starts the tests in the background makes them ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real image sets: `$FOVEA_DATA`, or `../shared/data` beside the checkout."""
    path = Path(os.environ.get("FOVEA_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not path.is_dir():
        pytest.skip("no real image sets here: set FOVEA_DATA to their folder")
    return path


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the database that runs of this worker share: making one takes seconds."""
    return tmp_path_factory.mktemp("prefect")


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def clip(tmp_path: Path) -> OpenClipBackboneConfig:
    import open_clip
    import torch

    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-clip").state_dict(), tmp_path / "weights.pt")
    return OpenClipBackboneConfig(model="tiny-clip", checkpoint=str(tmp_path / "weights.pt"))


def picture(seed: int, size: tuple[int, int] = (40, 32), mode: str = "RGB") -> Image.Image:
    """A picture of random soft blobs, the same for the same seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode_image(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_folder(folder: Path, count: int, classes: int = 0, first: int = 0) -> Path:
    """A folder of PNG pictures, in class folders if asked."""
    for number in range(first, first + count):
        parent = folder / f"class{number % classes}" if classes else folder
        parent.mkdir(parents=True, exist_ok=True)
        (parent / f"{number:04d}.png").write_bytes(encode_image(picture(number)))
    return folder


def exit_code(*arguments: str) -> int | str | None:
    """The exit code of `fovea` with some arguments, run in this process."""
    try:
        main(list(arguments))
    except SystemExit as ended:
        return ended.code
    return 0


def ingest_folder(source: Path, out: Path, **settings: object) -> Corpus:
    return Corpus.open(ingest(IngestConfig(source=str(source), out=str(out), **settings)).url)
