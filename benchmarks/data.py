"""Training views of photographs: images a CPU-second of Fovea's loader beside the usual one.

The peer is torchvision's ImageFolder with DINOv2's transforms on Pillow images, as the official code composes them;
both run in one process, 2 global crops of 224 px and 8 local ones of 96. Ours counts reading shards, decoding,
cropping and recolouring. The photographs are the `webpool` set ($FOVEA_DATA or ../shared/data), as they are (about
350 px) and enlarged to 1,024 px.
"""

from __future__ import annotations

import io
import os
import random
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.rows import Row, cpu_seconds, main
from curation.config import IngestConfig
from curation.ingest import ingest
from infra.corpora import Corpus
from pretrain.config import PretrainSettings
from pretrain.data import photometric
from pretrain.data.config import IMAGENET_MEAN, IMAGENET_STD
from pretrain.data.loader import ViewDataset
from pretrain.train import view_dataset

IMAGES = 64
SETTINGS = PretrainSettings()


def _photographs() -> list[Image.Image]:
    data = Path(os.environ.get("FOVEA_DATA") or Path(__file__).parents[2] / "shared" / "data")
    found: list[Image.Image] = []
    for shard in sorted((data / "webpool").glob("*.tar")):
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
        colour = [transforms.RandomApply([jitter], p=0.8), transforms.RandomGrayscale(0.2)]
        blur = transforms.GaussianBlur(9, (0.1, 2.0))
        end = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        bicubic = transforms.InterpolationMode.BICUBIC

        def crop(size: int, scale: tuple[float, float], share: float, solarize: float) -> transforms.Compose:
            return transforms.Compose(
                [
                    transforms.RandomResizedCrop(size, scale, interpolation=bicubic),
                    transforms.RandomHorizontalFlip(),
                    *colour,
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


def ours(dataset: ViewDataset) -> None:
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    for first in range(0, IMAGES, 16):
        batch = dataset.batch(np.arange(first, first + 16))
        for crops, colours in (
            (batch.global_crops, batch.global_photometric),
            (batch.local_crops, batch.local_photometric),
        ):
            (photometric.apply(crops.float() / 255, colours) - mean) / std


def peer(dataset: ImageFolder) -> None:
    random.seed(0)
    torch.manual_seed(0)
    for index in range(IMAGES):
        dataset[index]


def measure() -> list[Row]:
    torch.set_num_threads(1)
    images = _photographs()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, side, target in (("webpool", None, 2.0), ("1,024 px", 1024, 3.0)):
            folder = Path(scratch) / name
            _write(images, folder, side)
            corpus = Corpus.open(ingest(IngestConfig(source=str(folder), out=f"{scratch}/{name}-corpus")).url)
            dataset, usual = view_dataset([corpus], SETTINGS), ImageFolder(str(folder), DinoTransform())
            mine, theirs = cpu_seconds(lambda d=dataset: ours(d), lambda u=usual: peer(u), repeats=3)
            rows.append(Row(name, IMAGES / mine, "images / CPU s", IMAGES / theirs, theirs / mine, target))
    return rows


if __name__ == "__main__":
    main("Views of photographs, 2 x 224 px and 8 x 96 px", measure)
