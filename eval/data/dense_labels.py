"""Patch tokens of images beside the maps (masks, depths) that belong to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eval.data.datasets import PAIRED
from eval.data.patch_tokens import PatchTokenGrids
from eval.eval_model import EvalModel
from infra.corpus.corpus import Corpus
from infra.corpus.names import extension_of
from infra.errors import UserError
from infra.progress import progress
from pretrain.backbones.base import TokenBackbone
from pretrain.data.decode import ImageRejected, open_image
from pretrain.data.image_metadata import UPRIGHT
from pretrain.data.images import read_image

_TOGETHER = 8  # images a forward pass: there are many patches


def side_for(backbone: TokenBackbone, grid: int) -> int:
    """The side that images are brought to for so many patches along it, or the only one that there is."""
    return grid * backbone.patch if backbone.any_size else backbone.side


def resize_to_square(image: Image.Image, side: int) -> np.ndarray:
    """A whole image squeezed to a square, uint8 `[side, side, 3]`."""
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def patch_tokens(backbone: TokenBackbone, images: np.ndarray) -> Tensor:
    """Of images, uint8 `[n, H, W, 3]`, the last block's patch tokens, float32 `[n, h, w, dim]`, on the CPU."""
    batch = backbone.get_normalized_layers(torch.from_numpy(np.array(images)))
    return backbone.layers(batch, 1)[1][-1].patch_tokens.float().cpu()


def extract_grids(model: EvalModel, corpus: Corpus, grid: int, task: str) -> PatchTokenGrids:
    """Patch tokens of all images of a dataset."""
    backbone = model.token_backbone(task)
    side, tokens = side_for(backbone, grid), None
    known = (corpus.artifact.id, side)
    if known in model.token_grids:
        return model.token_grids[known]
    with progress(f"patches of {model.name}", len(corpus)) as advance:
        for start in range(0, len(corpus), _TOGETHER):
            rows = range(start, min(start + _TOGETHER, len(corpus)))
            images = np.stack([resize_to_square(read_image(corpus, row), side) for row in rows])
            found = patch_tokens(backbone, images).numpy()
            if tokens is None:
                tokens = model.allocate_scratch((len(corpus), *found.shape[1:]))
            tokens[start : start + len(found)] = found
            advance(len(rows))
    if tokens is None:
        raise UserError(f"{corpus.artifact.url}: has no images; give a dataset that has")
    return model.token_grids.setdefault(known, PatchTokenGrids(tokens))


def read_map(corpus: Corpus, row: int, extension: str) -> np.ndarray:
    """The map beside an image, `[H, W]`: numbers as they are stored, of a PNG of one channel or of a palette.

    Of a dataset of two folders it is the only one, whatever it is asked for by.

    Raises:
        UserError: there is none, or it is no such image.
    """
    entry = corpus.index_row(row)
    beside = {extension_of(each["name"]): each for each in entry["members"]}
    member = beside.get(extension, beside.get(PAIRED))
    if member is None:
        raise UserError(f"{corpus.artifact.url}: {entry['key']} has no {extension} beside it; set the task's member")
    data = corpus.read_range(entry["shard"], member["offset"], member["size"])
    try:
        values = np.asarray(open_image(data).header)
    except (ImageRejected, OSError, ValueError, SyntaxError):  # of its header, or of its pixels
        raise UserError(f"{corpus.artifact.url}: {member['name']} is no readable image; fix it") from None
    if values.ndim != 2:
        raise UserError(f"{corpus.artifact.url}: {member['name']} has {values.shape[-1]} channels; a map has one")
    _require_same_view(corpus, row, entry, values.shape)
    return values


def _require_same_view(corpus: Corpus, row: int, entry: Mapping[str, Any], shape: tuple[int, int]) -> None:
    """Check that a map, of any scale, and the upright image show the same.

    Raises:
        UserError: their proportions differ, or EXIF turns the image in a way of which they do not tell.
    """
    size, mapped = (entry["width"], entry["height"]), shape[::-1]
    who = f"{corpus.artifact.url}: {entry['key']}: the map is {mapped[0]}x{mapped[1]}, the image {size[0]}x{size[1]}"
    if not _same_proportions(size, mapped):
        turned = " as EXIF turns it" if _same_proportions(size, mapped[::-1]) else ""
        raise UserError(f"{who}{turned}; store images upright, or give maps that fit them")
    orientation = open_image(corpus.read_image(row)).orientation
    if orientation != UPRIGHT and (orientation < 5 or size[0] == size[1]):
        raise UserError(
            f"{who} and is turned by EXIF orientation {orientation}; sizes do not show whether the map is turned too, "
            "so store the image upright"
        )


def _same_proportions(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether one size is the other one scaled, up to a pixel."""
    small, large = sorted((first, second))
    return abs(large[0] * small[1] / large[1] - small[0]) <= 1 or abs(large[1] * small[0] / large[0] - small[1]) <= 1


def patch_class_fractions(values: np.ndarray, classes: np.ndarray, shape: tuple[int, int], side: int) -> np.ndarray:
    """What share of each patch each class has, float32 `[h * w, classes]`; of what is none of them nothing.

    Args:
        values: class of each pixel `[H, W]`.
        classes: numbers that count, int64, ascending.
        shape: patches in height and width.
        side: of the square that the image was squeezed to, at most; maps are brought near it, by nearest pixels.
    """
    cell = max(round(side / shape[0]), 1)
    rows = (np.arange(shape[0] * cell) + 0.5) * values.shape[0] / (shape[0] * cell)
    columns = (np.arange(shape[1] * cell) + 0.5) * values.shape[1] / (shape[1] * cell)
    squeezed = values[rows.astype(int)[:, None], columns.astype(int)[None]]
    places = np.searchsorted(classes, squeezed).clip(0, len(classes) - 1)
    known = classes[places] == squeezed
    patch = (np.arange(shape[0] * cell) // cell)[:, None] * shape[1] + (np.arange(shape[1] * cell) // cell)[None]
    flat = (patch * len(classes) + places)[known]
    counts = np.bincount(flat, minlength=shape[0] * shape[1] * len(classes))
    return (counts.reshape(-1, len(classes)) / cell**2).astype(np.float32)


def upsample(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Maps `[c, h, w]` at the size of an image, `[c, H, W]`, between patches linearly."""
    return F.interpolate(values[None], size=tuple(shape), mode="bilinear", align_corners=False)[0]
