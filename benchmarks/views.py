"""Multi-crop views of small images: ours against torchvision's transforms, CPU-seconds for the same crops.

Ours cuts crops with Pillow and recolours whole batches; the peer is the usual composition of torchvision v2 transforms
on each crop. 64 images of 32 px, 2 global and 4 local crops with jitter, grey, blur and solarize.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.rows import Row, compared, cpu_seconds, main
from pretrain.data import photometric
from pretrain.data.config import Crops, Photometric, Views
from pretrain.data.views import cut

_COLOURS = Photometric(blur=0.5, solarize=0.2)
_CROPS = ((Crops(size=32, photometric=[_COLOURS]), 2), (Crops(size=16, scale=(0.05, 0.32), photometric=[_COLOURS]), 4))


def _images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(64)]


def ours(images: list[Image.Image]) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    outputs = []
    for crops, count in _CROPS:
        pixels, parameters = zip(
            *((each.pixels, each.photometric) for each in (cut(image, crops, count, Views(), rng) for image in images)),
            strict=True,
        )
        batch = torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2).float() / 255
        outputs.append(photometric.apply(batch, torch.from_numpy(np.concatenate(parameters))))
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
    transforms = [(_torchvision(crops), count) for crops, count in _CROPS]
    mine, theirs = cpu_seconds(lambda: ours(images), lambda: peer(images, transforms))
    return [compared("views", mine, theirs, "CPU s", target=1.5)]


if __name__ == "__main__":
    main("Views of 64 images, 2 x 32 px and 4 x 16 px", measure)
