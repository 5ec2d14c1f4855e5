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
    """Power of the frequency that coefficients are multiplied by: 1 evens out natural images, more looks at detail,
    0 keeps plain pixels."""
    signs: bool = True
    """Keep the coefficients' signs. Without them mirrored and negative images are alike: for likeness, not copies."""


class CheckpointBackboneConfig(Config):
    """The released backbone of a Fovea checkpoint, or the same backbone before its first step."""

    kind: Literal["checkpoint"] = "checkpoint"
    url: str
    """URL of the checkpoint artifact."""
    untrained: bool = False
    """Take the initial weights instead."""


class OfficialBackboneConfig(Config):
    """A Vision Transformer from an official DINOv2 or DINOv3 checkpoint: a state dict, or a training's teacher."""

    kind: Literal["official"] = "official"
    checkpoint: str
    """Path of its weights on this machine, or a name to fetch them by: of timm `pretrained`, of open_clip a tag, of
    transformers OWNER/NAME."""
    architecture: VisionTransformerConfig = VisionTransformerConfig()
    """The dimensions and parts it was trained with."""
    input_size: int = Field(224, ge=8)
    """Side in pixels that images are brought to; a multiple of the patch size."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel that is subtracted, values 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel that is divided by."""


class OpenClipBackboneConfig(Config):
    """The image tower of an open_clip model."""

    kind: Literal["open_clip"] = "open_clip"
    model: str
    """The model's name in its library."""
    checkpoint: str
    """Path of its weights on this machine, or a name to fetch them by: of timm `pretrained`, of open_clip a tag, of
    transformers OWNER/NAME."""


class TimmBackboneConfig(Config):
    """A model of timm, without its classifier; its preprocessing is timm's."""

    kind: Literal["timm"] = "timm"
    model: str
    """The model's name in its library."""
    checkpoint: str
    """Path of its weights on this machine, or a name to fetch them by: of timm `pretrained`, of open_clip a tag, of
    transformers OWNER/NAME."""


class TransformersBackboneConfig(Config):
    """A vision model of transformers, as `save_pretrained` left it with its image processor."""

    kind: Literal["transformers"] = "transformers"
    checkpoint: str
    """Path of its weights on this machine, or a name to fetch them by: of timm `pretrained`, of open_clip a tag, of
    transformers OWNER/NAME."""


class TorchHubBackboneConfig(Config):
    """A model of a torch.hub repository that lies in a folder, DINOv2's say. The repository's code is run."""

    kind: Literal["torch_hub"] = "torch_hub"
    repository: str
    """Path of the folder with hubconf.py."""
    model: str
    """The model's name in its library."""
    checkpoint: str
    """Path of its weights on this machine, or a name to fetch them by: of timm `pretrained`, of open_clip a tag, of
    transformers OWNER/NAME."""
    input_size: int = Field(224, ge=8)
    """Side in pixels that images are brought to; a multiple of the patch size."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel that is subtracted, values 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel that is divided by."""


class TorchScriptBackboneConfig(Config):
    """A TorchScript module from images to vectors, as copy-detection networks like SSCD (288 pixels) are given out."""

    kind: Literal["torchscript"] = "torchscript"
    checkpoint: str
    """Path of its weights on this machine, or a name to fetch them by: of timm `pretrained`, of open_clip a tag, of
    transformers OWNER/NAME."""
    input_size: int = Field(224, ge=8)
    """Side in pixels that images are brought to; a multiple of the patch size."""
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
