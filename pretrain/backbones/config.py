"""Settings of backbones: what names a frozen backbone of any origin."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from infra.config import Config
from pretrain.data.config import IMAGENET_MEAN, IMAGENET_STD
from pretrain.models.config import VisionTransformerConfig

PRETRAINED = "pretrained"  # in place of a path: what the library itself gives out under the model's name


class PixelDescriptorConfig(Config):
    """Low frequencies of a small thumbnail: a descriptor that needs no training."""

    kind: Literal["pixels"] = "pixels"
    side: int = Field(16, ge=2)
    """Side of the thumbnail in pixels."""
    frequencies: int = Field(8, ge=1)
    """Lowest frequencies kept in each direction, at most `side`."""
    whiten: float = Field(1.5, ge=0)
    """Exponent of the frequency that scales the coefficients. 0 keeps plain pixels, 1 evens out natural images, higher
    values emphasize detail."""
    signs: bool = True
    """Keep the coefficients' signs. false makes mirrored and negative images equal, which suits retrieval but not
    duplicates."""


class CheckpointBackboneConfig(Config):
    """The released backbone of a Fovea checkpoint, or the same backbone before its first step."""

    kind: Literal["checkpoint"] = "checkpoint"
    url: str
    """URL of the checkpoint artifact."""
    untrained: bool = False
    """Use the initial weights instead of the trained ones."""


class OfficialBackboneConfig(Config):
    """A Vision Transformer from an official DINOv2 or DINOv3 checkpoint: a state dict, or a training's teacher."""

    kind: Literal["official"] = "official"
    checkpoint: str
    """Path of the weights."""
    architecture: VisionTransformerConfig = VisionTransformerConfig()
    """Dimensions and parts of the trained network."""
    input_size: int = Field(224, ge=8)
    """Side in pixels of the images; a multiple of the patch size."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel that is subtracted, values 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel that is divided by."""


class OpenClipBackboneConfig(Config):
    """The image tower of an open_clip model."""

    kind: Literal["open_clip"] = "open_clip"
    model: str
    """Name of the model in open_clip."""
    checkpoint: str
    """Path of the weights, or an open_clip tag to download them by."""


class TimmBackboneConfig(Config):
    """A model of timm, without its classifier; its preprocessing is timm's."""

    kind: Literal["timm"] = "timm"
    model: str
    """Name of the model in timm."""
    checkpoint: str
    """Path of the weights, or `pretrained` to download timm's."""


class TransformersBackboneConfig(Config):
    """A vision model of transformers, as `save_pretrained` left it with its image processor."""

    kind: Literal["transformers"] = "transformers"
    checkpoint: str
    """Path of the model's folder, or OWNER/NAME of a Hugging Face repository to download."""


class TorchHubBackboneConfig(Config):
    """A model of a torch.hub repository that lies in a folder, DINOv2's say. The repository's code is run."""

    kind: Literal["torch_hub"] = "torch_hub"
    repository: str
    """Path of the folder with hubconf.py."""
    model: str
    """Name of the entry point in hubconf.py."""
    checkpoint: str
    """Path of the weights."""
    input_size: int = Field(224, ge=8)
    """Side in pixels of the images."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel that is subtracted, values 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel that is divided by."""


class TorchScriptBackboneConfig(Config):
    """A TorchScript module from images to vectors, as copy-detection networks like SSCD (288 pixels) are given out."""

    kind: Literal["torchscript"] = "torchscript"
    checkpoint: str
    """Path of the TorchScript module."""
    input_size: int = Field(224, ge=8)
    """Side in pixels of the images."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel that is subtracted, values 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel that is divided by."""


BackboneConfig = Annotated[
    PixelDescriptorConfig
    | CheckpointBackboneConfig
    | OfficialBackboneConfig
    | OpenClipBackboneConfig
    | TimmBackboneConfig
    | TransformersBackboneConfig
    | TorchHubBackboneConfig
    | TorchScriptBackboneConfig,
    Field(discriminator="kind"),
]
