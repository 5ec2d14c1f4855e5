"""Frozen backbones of any origin behind one call: images in, vectors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.errors import UserError
from pretrain import published, weights
from pretrain.checkpoints import Checkpoint
from pretrain.config import (
    BackboneConfig,
    CheckpointBackbone,
    OfficialBackbone,
    OpenClipBackbone,
    PixelDescriptor,
)
from pretrain.data.config import IMAGENET_MEAN, IMAGENET_STD, Views
from pretrain.models import timm_network
from pretrain.models.official import from_official
from pretrain.models.timm_network import Network, TimmNetwork
from pretrain.models.vit import VisionTransformer
from pretrain.ranks import device_of_rank


class Backbone(Protocol):
    """A frozen map from images to vectors."""

    def preprocess(self, image: Image.Image) -> np.ndarray | Tensor:
        """One RGB image to the array that `features` takes a stack of."""

    def features(self, batch: Tensor) -> Tensor:
        """A stack of preprocessed images to float32 `[n, dim]`."""


@dataclass
class Tokens:
    """What a block says of n images; float32, on the CPU or the GPU."""

    class_token: Tensor
    """`[n, dim]`; of a network without one the mean of its patches"""
    patch_tokens: Tensor
    """`[n, h, w, dim]`"""


@runtime_checkable
class TokenBackbone(Backbone, Protocol):
    """A backbone that tells of every patch, too."""

    @property
    def side(self) -> int:
        """Side in pixels that images are brought to."""

    @property
    def patch(self) -> int:
        """Side in pixels of what a patch token stands for; sides of images are multiples of it."""

    @property
    def any_size(self) -> bool:
        """Whether images may have other sides than `side`."""

    def normalised(self, images: Tensor) -> Tensor:
        """Images that are not preprocessed, uint8 `[n, H, W, 3]`, to what `layers` takes."""

    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        """What `features` gives, and the tokens after each of the last blocks, in order; of fewer blocks, all.

        Args:
            norm: give them through the final norm, where the network has one.
        """


def with_tokens(backbone: Backbone, who: str) -> TokenBackbone:
    """The same backbone, known to have patch tokens.

    Raises:
        UserError: it has none.
    """
    if not isinstance(backbone, TokenBackbone):
        raise UserError(f"{who}: this backbone gives one vector an image and no patch tokens; leave the task out")
    return backbone


def load(config: BackboneConfig) -> Backbone:
    """Load a backbone onto the GPU, if there is one.

    Raises:
        UserError: the checkpoint is missing or does not fit.
    """
    if isinstance(config, PixelDescriptor):
        return Pixels(config)
    if isinstance(config, CheckpointBackbone):
        return _of_checkpoint(config)
    if isinstance(config, OfficialBackbone):
        return CheckpointedViT.from_official(config)
    if isinstance(config, OpenClipBackbone):
        return OpenClip(config)
    from pretrain import foreign

    return foreign.load(config)


def default_device() -> torch.device:
    """This process's GPU, if there is one."""
    return device_of_rank()


_MOST_ASPECT = 16
_FLOOR = 1e-3  # below it a vector is rounding noise: an image of one colour is like nothing


class Pixels:
    """Low-frequency cosine coefficients of a thumbnail, centred at mid-grey and weighted by frequency."""

    def __init__(self, config: PixelDescriptor) -> None:
        from scipy.fft import dct

        self.side, self.signs = config.side, config.signs
        kept = min(config.frequencies, config.side)
        self.transform = torch.from_numpy(dct(np.eye(config.side), axis=0, norm="ortho")[:kept]).float()
        rank = torch.arange(kept, dtype=torch.float32)
        radius = (rank[:, None] ** 2 + rank[None, :] ** 2).sqrt()
        self.weights = radius**config.whiten  # 0**0 is 1: without whitening the mean colour counts, with it not

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((self.side, self.side), Image.Resampling.BOX))

    def features(self, batch: Tensor) -> Tensor:
        pixels = batch.permute(0, 3, 1, 2).float() / 255 - 0.5
        coefficients = self.transform @ pixels @ self.transform.T
        vectors = (coefficients if self.signs else coefficients.abs()).mul(self.weights).flatten(1)
        return vectors * (vectors.norm(dim=1, keepdim=True) > _FLOOR)


def _of_checkpoint(config: CheckpointBackbone) -> Backbone:
    checkpoint = Checkpoint.open(config.url)
    model = checkpoint.untrained() if config.untrained else checkpoint.backbone()
    return checkpointed(model, checkpoint.views)


def checkpointed(model: Network, views: Views) -> CheckpointedViT | CheckpointedNetwork:
    """The backbone of a checkpoint behind the call of all backbones, on the GPU, if there is one."""
    if isinstance(model, TimmNetwork):
        return CheckpointedNetwork.of(model, model.image_size, views.mean, views.std)
    return CheckpointedViT.of(model, model.image_size, views.mean, views.std)


Model = TypeVar("Model", VisionTransformer, TimmNetwork)


@dataclass
class Checkpointed(Generic[Model]):
    """A network of a checkpoint; its vector is the class token."""

    model: Model
    side: int
    """Side in pixels that images are brought to."""
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, model: Model, side: int, mean: Sequence[float], std: Sequence[float]) -> Self:
        device = default_device()
        return cls(
            model.to(device), side, *(torch.tensor(each, device=device).view(1, 3, 1, 1) for each in (mean, std))
        )

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return center_crop(image, self.side)

    @property
    def patch(self) -> int:
        return self.model.patch_size

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        return self.model([self.pixels(batch)])[0].class_token.float().cpu()

    def normalised(self, images: Tensor) -> Tensor:
        return images

    def pixels(self, images: Tensor) -> Tensor:
        """What the network takes of images, uint8 `[n, H, W, 3]`."""
        return (images.to(self.mean.device).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


class CheckpointedNetwork(Checkpointed[TimmNetwork]):
    """A network of timm that was distilled."""

    @property
    def any_size(self) -> bool:
        return self.model.any_size

    @torch.inference_mode()
    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        images = self.model.fitting(self.pixels(batch))
        vectors, found = timm_network.layers(self.model.network, images, blocks, norm)
        return vectors.float().cpu(), [tokens_of(grid, prefix) for grid, prefix in found]


class CheckpointedViT(Checkpointed[VisionTransformer]):
    """A Vision Transformer of a checkpoint, ours or an official one."""

    @classmethod
    def from_official(cls, config: OfficialBackbone) -> CheckpointedViT:
        state = weights.read(config.checkpoint)
        model = VisionTransformer(config.architecture).requires_grad_(False).eval()
        try:
            state = state.get("teacher", state) if isinstance(state, dict) else {}
            model.load_state_dict(from_official(state, config.architecture))
        except UserError as error:
            raise UserError(f"{config.checkpoint}: {error}") from None
        return cls.of(model, config.input_size, config.mean, config.std)

    @property
    def any_size(self) -> bool:
        return True

    @torch.inference_mode()
    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        pixels = self.pixels(batch)
        found = self.model.intermediate(pixels, blocks, norm)
        grid = tuple(side // self.patch for side in pixels.shape[-2:])
        tokens = [Tokens(each.class_token.float(), each.patch_tokens.float().unflatten(1, grid)) for each in found]
        vectors = tokens[-1].class_token if norm else self.model([pixels])[0].class_token.float()
        return vectors.cpu(), tokens


class OpenClip:
    """The image tower of an open_clip model."""

    def __init__(self, config: OpenClipBackbone) -> None:
        import open_clip

        try:
            how = published.preprocessing(config)
            model, _, preprocess = open_clip.create_model_and_transforms(
                config.model,
                pretrained=config.checkpoint,
                image_mean=how["mean"],
                image_std=how["std"],
                image_interpolation=how["interpolation"],
                image_resize_mode=how["resize_mode"],
            )
        except Exception as error:  # a damaged file can raise anything in the readers; none runs code of it
            raise UserError(
                f"{config.checkpoint}: not a checkpoint of {config.model}: {error}".splitlines()[0]
            ) from None
        self._preprocess: Any = preprocess
        self.model = model.requires_grad_(False).eval().to(default_device())
        visual: Any = self.model.visual
        self.depth = len(visual.trunk.feature_info) if hasattr(visual, "trunk") else _depth(visual)
        self.side = max(_pair(visual.image_size))
        self.patch = max(_pair(getattr(visual, "patch_size", 32)))  # ResNets shrink by 32
        self.any_size = False
        self._normalise = Normaliser(visual.image_mean or IMAGENET_MEAN, visual.image_std or IMAGENET_STD)

    def preprocess(self, image: Image.Image) -> Tensor:
        return self._preprocess(without_ends(image))

    @torch.inference_mode()
    def features(self, batch: Tensor) -> Tensor:
        return self.model.encode_image(batch.to(default_device())).float().cpu()

    def normalised(self, images: Tensor) -> Tensor:
        return self._normalise(images)

    @torch.inference_mode()
    def layers(self, batch: Tensor, blocks: int, norm: bool = True) -> tuple[Tensor, list[Tokens]]:
        options = {"normalize_intermediates": norm, "output_extra_tokens": True}
        last = min(blocks, self.depth)
        found = self.model.visual.forward_intermediates(batch.to(default_device()), last, **options)
        maps, prefixes = found["image_intermediates"], found.get("image_intermediates_prefix")
        tokens = [tokens_of(each, prefixes[i] if prefixes else None) for i, each in enumerate(maps)]
        return found["image_features"].float().cpu(), tokens


def _depth(visual: Any) -> int:
    """Blocks of a Vision Transformer, or stages of a ResNet."""
    return len(visual.transformer.resblocks) if hasattr(visual, "transformer") else 4


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


class Normaliser:
    """Images, uint8 `[n, H, W, 3]`, to normalised ones, float32 `[n, 3, H, W]`."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean, self._std = (torch.tensor(each).view(1, 3, 1, 1) for each in (mean, std))

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (each.to(images.device) for each in (self._mean, self._std))
        return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def tokens_of(grid: Tensor, prefix: Tensor | None) -> Tokens:
    """Tokens of a map `[n, dim, h, w]` and of what stands before it, `[n, tokens, dim]`, the class token first."""
    patches = grid.float().permute(0, 2, 3, 1)
    return Tokens(patches.mean((1, 2)) if prefix is None else prefix[:, 0].float(), patches)


def without_ends(image: Image.Image) -> Image.Image:
    """The middle of an image of more than `_MOST_ASPECT` times its shorter side; any other one as it is.

    Resizing the shorter side of a strip first, as the transforms of all libraries do, would take gigabytes for pixels
    that the center crop cuts off.
    """
    shorter, longer = sorted(image.size)
    if longer <= _MOST_ASPECT * shorter:
        return image
    start = (longer - _MOST_ASPECT * shorter) // 2
    ends = (start, start + _MOST_ASPECT * shorter)
    box = (0, ends[0], shorter, ends[1]) if image.height > image.width else (ends[0], 0, ends[1], shorter)
    return image.crop(box)


def center_crop(image: Image.Image, side: int) -> np.ndarray:
    """The middle square of an image at a given side, uint8 `[side, side, 3]`.

    Larger sides keep a border of one eighth, as in ImageNet's 256 to 224; small ones, where it would be a few pixels,
    keep none.
    """
    image = without_ends(image)
    resize = round(side * 256 / 224) if side >= 64 else side
    # The longer side is rounded down and the middle to even, as torchvision, and so timm, does.
    width, height = (resize if each == min(image.size) else int(each * resize / min(image.size)) for each in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side)))
