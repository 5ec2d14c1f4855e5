"""What the data side can be told. Imports no torch, so that `fovea --help` stays quick."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from infra.config import Config

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Photometric(Config):
    """How strongly one kind of crop is recolored. Probabilities are per image."""

    jitter_prob: float = Field(0.8, ge=0, le=1)
    """Probability of color jitter."""
    brightness: float = Field(0.4, ge=0)
    """Maximum relative change of brightness: the factor lies in 1 ± this."""
    contrast: float = Field(0.4, ge=0)
    """Maximum relative change of contrast: the factor lies in 1 ± this."""
    saturation: float = Field(0.2, ge=0)
    """Maximum relative change of saturation: the factor lies in 1 ± this."""
    hue: float = Field(0.1, ge=0, le=0.5)
    """Maximum turn of the hue as a share of the circle."""
    grayscale_prob: float = Field(0.2, ge=0, le=1)
    """Probability of a gray image."""
    blur_prob: float = Field(0.0, ge=0, le=1)
    """Probability of a Gaussian blur with sigma 0.1 to 2 pixels."""
    solarize_prob: float = Field(0.0, ge=0, le=1)
    """Probability of inverting the values of 128 and above."""
    invert_prob: float = Field(0.0, ge=0, le=1)
    """Probability of a negative."""
    channel_shuffle_prob: float = Field(0.0, ge=0, le=1)
    """Probability of a random order of the color channels."""


class Crops(Config):
    """One kind of random crop, resized to a square."""

    size: int = Field(224, ge=8)
    """Side in pixels after resizing; a multiple of the patch size."""
    scale: tuple[float, float] = (0.32, 1.0)
    """Minimum and maximum share of the image's area."""
    photometric: list[Photometric] = Field(default_factory=lambda: [Photometric()], min_length=1)
    """Color augmentation of each crop. The last entry serves all further crops."""


class Views(Config):
    """Multi-crop views (SwAV, arXiv 2006.09882; scales and colors of DINOv2, arXiv 2304.07193)."""

    global_crops: Crops = Crops(photometric=[Photometric(blur_prob=1.0), Photometric(blur_prob=0.1, solarize_prob=0.2)])
    """The global crops."""
    num_global_crops: int = Field(2, ge=1, le=2)
    """Number of global crops of an image. Self-distillation needs two; MAE, CLIP and SigLIP need one."""
    local_crops: Crops = Crops(size=96, scale=(0.05, 0.32), photometric=[Photometric(blur_prob=0.5)])
    """The local crops."""
    num_local_crops: int = Field(8, ge=0)
    """Number of local crops of an image. 0: none."""
    gram_crop_size: int | None = Field(None, ge=8)
    """Side in pixels of additional global crops without color augmentation, which Gram anchoring's teacher reads. null:
    none."""
    inverted_blur: bool = False
    """Blur with one minus the probability, a bug of DINOv2 and DINOv3 (dinov3 issue 286)."""
    color_augment_on: Literal["workers", "device"] = "workers"
    """Place of the color augmentation: workers (the loader's processes, 8 bits, as Pillow) or device (the training
    device, floating point, which spares CPU cores)."""
    hflip_prob: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip of each crop."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel that is subtracted, values 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel that is divided by."""
    mask_probability: float = Field(0.5, ge=0, le=1)
    """Share of the global crops that are masked for the student."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Minimum and maximum share of masked patches in a masked crop."""
    mask_sampler: Literal["dinov3", "dinov2"] = "dinov3"
    """Mask sampler: dinov3 draws blocks, then single patches up to the exact number; dinov2 draws blocks alone and may
    fall short."""
    mask_shift: bool = False
    """Shift masks around the image's edges (DINOv3)."""

    def sizes(self) -> dict[str, int]:
        """Sides in pixels of all crops there are, by the keys that set them."""
        found = {"views.global_crops.size": self.global_crops.size}
        if self.num_local_crops:
            found["views.local_crops.size"] = self.local_crops.size
        return found if self.gram_crop_size is None else found | {"views.gram_crop_size": self.gram_crop_size}


class Sampling(Config):
    """Order of the samples."""

    shuffle: Literal["global", "shard_window"] = "global"
    """global: samples of the whole corpus in random order, each read on its own, for local disks and object stores.
    shard_window: samples of a few shards at a time, in random order within them, so that a cache or a spinning disk
    reads each shard once an epoch."""
    window_shards: int = Field(64, ge=2)
    """Number of shards in a window. More shards mix the batches better."""
    weighted: bool = False
    """Repeat each sample by the selection's weight instead of once an epoch."""
