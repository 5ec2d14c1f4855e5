"""Training views of photographs: Fovea's loader beside the usual ones, and its ingest beside reading and hashing alone.

The peers are torchvision's ImageFolder and plain webdataset, both with DINOv2's transforms on Pillow images as the
official code composes them. Every loader runs in a process of its own with one worker process: 2 global crops of 224 px
and 8 local ones of 96, recolored. CPU-seconds are those of both processes. The photographs are the `webpool` set
($FOVEA_DATA or ../shared/data), as they are (about 350 px) and enlarged to 1,024 px.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import random
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.report import Row, compared, main
from curation.config import IngestConfig
from curation.ingest.ingest import ingest
from infra.corpus.corpus import Corpus
from pretrain.config import PretrainSettings
from pretrain.data.config import IMAGENET_MEAN, IMAGENET_STD
from pretrain.data.loader import RankBatchSampler, batches
from pretrain.train import build_view_dataset

IMAGES = 192
BATCH = 16
ROUNDS = 3
EPOCHS = 10
SETTINGS = PretrainSettings()


def _data() -> Path:
    return Path(os.environ.get("FOVEA_DATA") or Path(__file__).parents[2] / "shared" / "data")


def _photographs() -> list[Image.Image]:
    found: list[Image.Image] = []
    for shard in sorted((_data() / "webpool").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith((".jpg", ".jpeg")):
                    found.append(Image.open(io.BytesIO(file.read())).convert("RGB"))
                if len(found) == IMAGES:
                    return found
    raise SystemExit("no photographs here: set FOVEA_DATA to the folder of the image sets")


def _write(images: list[Image.Image], folder: Path, side: int | None) -> None:
    (folder / "class").mkdir(parents=True)
    for number, image in enumerate(images):
        if side is not None:
            factor = side / max(image.size)
            image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
        image.save(folder / "class" / f"{number:04d}.jpg", quality=90)


class DinoTransform:
    """DINOv2's augmentation (data/augmentations.py) of torchvision's parts."""

    def __init__(self) -> None:
        jitter = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
        color = [transforms.RandomApply([jitter], p=0.8), transforms.RandomGrayscale(0.2)]
        blur = transforms.GaussianBlur(9, (0.1, 2.0))
        end = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        bicubic = transforms.InterpolationMode.BICUBIC

        def crop(size: int, scale: tuple[float, float], share: float, solarize: float) -> transforms.Compose:
            return transforms.Compose(
                [
                    transforms.RandomResizedCrop(size, scale, interpolation=bicubic),
                    transforms.RandomHorizontalFlip(),
                    *color,
                    transforms.RandomApply([blur], p=share),
                    transforms.RandomSolarize(128, solarize),
                    *end,
                ]
            )

        self.globals = [crop(224, (0.32, 1.0), 1.0, 0.0), crop(224, (0.32, 1.0), 0.1, 0.2)]
        self.local = crop(96, (0.05, 0.32), 0.5, 0.0)

    def __call__(self, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        large = torch.stack([each(image) for each in self.globals])
        return large, torch.stack([self.local(image) for _ in range(8)])


def ours(folder: str, corpus: str) -> Iterable[Any]:
    return batches(
        build_view_dataset([corpus], SETTINGS), RankBatchSampler(0, 1, BATCH, 1, 0, IMAGES // BATCH), workers=1
    )


def folder_of_files(folder: str, corpus: str) -> Iterable[Any]:
    return DataLoader(ImageFolder(folder, DinoTransform()), BATCH, shuffle=True, num_workers=1)


def webdataset(folder: str, corpus: str) -> Iterable[Any]:
    import webdataset as wds

    shards = [shard.url for shard in Corpus.open(corpus).shards]
    urls = [str(Path(corpus) / url) for url in shards]
    samples = wds.WebDataset(urls, shardshuffle=False).shuffle(100, seed=0).decode("pil").to_tuple("jpg")
    return wds.WebLoader(samples.map_tuple(DinoTransform()).batched(BATCH), batch_size=None, num_workers=1)


def _one_thread() -> None:
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)


def _measured(loader: Callable[[str, str], Iterable[Any]], folder: str, corpus: str) -> tuple[float, float]:
    """CPU-seconds of one epoch and peak memory of the worker in MB."""
    _one_thread()
    before = sum(os.times()[:4])
    for _ in loader(folder, corpus):
        pass
    return sum(os.times()[:4]) - before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def _memory_by_epoch(corpus: str) -> list[float]:
    """Memory of the loading process alone after each of some epochs, in MB."""
    _one_thread()
    dataset, after = build_view_dataset([corpus], SETTINGS), []
    for epoch in range(EPOCHS):
        for first in range(epoch * IMAGES, (epoch + 1) * IMAGES, BATCH):
            dataset.batch(np.arange(first, first + BATCH))
        after.append(psutil.Process().memory_full_info().uss / 1e6)
    return after


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _ingest_seconds(folder: str, scratch: str) -> tuple[float, float]:
    """CPU-seconds of indexing shards in place, and of reading them and hashing every byte once."""
    with tempfile.TemporaryDirectory(dir=scratch) as fresh:
        os.environ["FOVEA_CACHE"] = fresh
        before = time.process_time()
        ingest(IngestConfig(source=folder, out=f"{fresh}/out", check="header", workers=1))
        mine = time.process_time() - before
    before = time.process_time()
    for shard in Path(folder).glob("*.tar"):
        hashlib.sha256(shard.read_bytes()).hexdigest()
    return mine, time.process_time() - before


def _loader_rows(name: str, folder: str, corpus: str, target: float) -> list[Row]:
    loaders = {"ours": ours, "ImageFolder": folder_of_files, "webdataset": webdataset}
    found: dict[str, list[tuple[float, float]]] = {loader: [] for loader in loaders}
    for _ in range(ROUNDS):
        for loader, make in loaders.items():
            found[loader].append(_apart(_measured, make, folder, corpus))
    seconds = {loader: statistics.median(each[0] for each in runs) for loader, runs in found.items()}
    memory = {loader: statistics.median(each[1] for each in runs) for loader, runs in found.items()}
    rows = []
    for peer in ("ImageFolder", "webdataset"):
        ratio = seconds[peer] / seconds["ours"]
        speeds = IMAGES / seconds["ours"], IMAGES / seconds[peer]
        rows.append(Row(f"{name}, {peer}", speeds[0], "images / CPU s", speeds[1], ratio, target))
        rows.append(compared(f"{name}, {peer}: worker's peak", memory["ours"], memory[peer], "MB"))
    return rows


def measure() -> list[Row]:
    images, rows = _photographs(), []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FOVEA_CACHE"] = f"{scratch}/cache"
        for name, side, target in (("350 px", None, 2.0), ("1,024 px", 1024, 3.0)):
            folder = Path(scratch) / name
            _write(images, folder, side)
            corpus = ingest(IngestConfig(source=str(folder), out=f"{scratch}/{name}-corpus", shard_mb=8)).url
            rows += _loader_rows(name, str(folder), corpus, target)
            after = _apart(_memory_by_epoch, corpus)
            flat = f"{name}: memory, epoch {EPOCHS} against 2"
            rows.append(Row(flat, after[-1], "MB", after[1], after[1] / after[-1], 0.95))
            rows.append(_ingest_row(name, f"{corpus}/shards", scratch))
        rows.append(_ingest_row("webpool's shards", str(_data() / "webpool"), scratch))
    return rows


def _ingest_row(name: str, folder: str, scratch: str) -> Row:
    times = [_apart(_ingest_seconds, folder, scratch) for _ in range(ROUNDS)]
    mine, theirs = (statistics.median(each[at] for each in times) for at in (0, 1))
    return compared(f"{name}: ingest, read and hash", mine, theirs, "CPU s", target=0.8)


if __name__ == "__main__":
    main("Views of photographs, 2 x 224 px and 8 x 96 px", measure)
