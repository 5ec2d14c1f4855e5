"""Multi-crop views of small images: ours against torchvision's transforms, CPU-seconds for the same crops.

Ours cuts and recolors 8-bit crops; the peer is the usual composition of torchvision v2 transforms
on each crop. 64 images of 32 px, 2 global and 4 local crops with jitter, gray, blur and solarize.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.report import Row, compared, cpu_seconds, main
from pretrain.data.config import Crops, Photometric, Views
from pretrain.data.views import extract_crops, sample_crops

_COLORS = Photometric(blur_prob=0.5, solarize_prob=0.2)
_CROPS = ((Crops(size=32, photometric=[_COLORS]), 2), (Crops(size=16, scale=(0.05, 0.32), photometric=[_COLORS]), 4))


def _images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(64)]


def ours(images: list[np.ndarray]) -> list[torch.Tensor]:
    rng, views, size = np.random.default_rng(0), Views(), (32, 32)
    outputs = []
    for crops, count in _CROPS:
        pixels = [
            extract_crops(image, size, sample_crops(size, crops, count, views, rng), crops.size, views).pixels
            for image in images
        ]
        outputs.append(torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2).float() / 255)
    return outputs


def _torchvision(crops: Crops) -> v2.Compose:
    return v2.Compose(
        [
            v2.RandomResizedCrop(crops.size, scale=crops.scale, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=0.5),
            v2.RandomSolarize(128, 0.2),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def peer(images: list[Image.Image], transforms: list[tuple[v2.Compose, int]]) -> list[torch.Tensor]:
    return [
        torch.stack([transform(image) for image in images for _ in range(count)]) for transform, count in transforms
    ]


def measure() -> list[Row]:
    torch.set_num_threads(1)
    images = _images()
    pictures = [Image.fromarray(image) for image in images]
    transforms = [(_torchvision(crops), count) for crops, count in _CROPS]
    mine, theirs = cpu_seconds(lambda: ours(images), lambda: peer(pictures, transforms))
    return [compared("views", mine, theirs, "CPU s", target=1.5)]


if __name__ == "__main__":
    main("Views of 64 images, 2 x 32 px and 4 x 16 px", measure)
