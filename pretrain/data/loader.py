"""Batches of views from corpora, in an order that is a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from infra.corpora import Corpus
from infra.errors import UserError
from pretrain.data import order
from pretrain.data.config import Views
from pretrain.data.decode import ImageRejected, decode_rgb
from pretrain.data.masks import batch_masks
from pretrain.data.views import GLOBAL_COUNT, cut


@dataclass
class Batch:
    """One micro-batch of B images. Crops are ordered crop by crop: all first crops, then all second ones."""

    global_crops: Tensor
    """uint8 `[2B, 3, H, W]`"""
    global_photometric: Tensor
    """float32 `[2B, 9]`"""
    local_crops: Tensor
    """uint8 `[L*B, 3, h, w]`"""
    local_photometric: Tensor
    """float32 `[L*B, 9]`"""
    masks: Tensor
    """bool `[2B, patches]`: patch tokens of the global crops hidden from the student"""
    positions: Tensor
    """int64 `[B]`: places in the endless run of epochs"""

    def to(self, device: torch.device) -> Batch:
        return Batch(**{each.name: getattr(self, each.name).to(device, non_blocking=True) for each in fields(self)})


@dataclass(frozen=True)
class MaskPlan:
    """How the patch tokens of global crops are masked."""

    patch_size: int
    share: float
    ratio: tuple[float, float]


class ViewDataset(Dataset[Batch | UserError]):
    """Maps the positions of a micro-batch to its views. Corpora are read one after the other as one."""

    def __init__(self, corpora: Sequence[Corpus], views: Views, masks: MaskPlan, seed: int) -> None:
        self.corpora = list(corpora)
        self.ends = np.cumsum([len(corpus) for corpus in corpora])
        self.views = views
        self.masks = masks
        self.seed = seed
        if self.size == 0:
            raise UserError(f"{corpora[0].artifact.url}: an empty corpus; nothing to train on")

    @property
    def size(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, positions: np.ndarray) -> Batch | UserError:
        try:
            return self.batch(positions)
        except UserError as error:  # raised across processes it would come wrapped in a traceback
            return error

    def batch(self, positions: np.ndarray) -> Batch:
        """The views of the images at given positions."""
        rows = order.rows_at(positions, self.seed, self.size)
        samples = [self._views(int(row), int(position)) for row, position in zip(rows, positions, strict=True)]
        crops, crop_parameters, small, small_parameters = zip(*samples, strict=True)
        return Batch(
            global_crops=_stack_images(crops),
            global_photometric=_stack(crop_parameters),
            local_crops=_stack_images(small),
            local_photometric=_stack(small_parameters),
            masks=torch.from_numpy(self._masks(positions)),
            positions=torch.from_numpy(positions),
        )

    def _views(self, row: int, position: int) -> tuple[np.ndarray, ...]:
        corpus_number = int(np.searchsorted(self.ends, row, side="right"))
        corpus = self.corpora[corpus_number]
        first = int(self.ends[corpus_number - 1]) if corpus_number else 0
        try:
            image = decode_rgb(corpus.read_image(row - first))
        except ImageRejected as error:
            key = corpus.keys[row - first]
            raise UserError(f"{corpus.artifact.url}: sample {key} is {error.reason} now; ingest it again") from None
        rng = order.generator(self.seed, order.AUGMENTATION, position)
        views = self.views
        return (
            *cut(image, views.globals, GLOBAL_COUNT, views.flip, rng),
            *cut(image, views.locals, views.local_count, views.flip, rng),
        )

    def _masks(self, positions: np.ndarray) -> np.ndarray:
        side = self.views.globals.size // self.masks.patch_size
        rng = order.generator(self.seed, order.MASKS, int(positions[0]))
        return batch_masks(GLOBAL_COUNT * len(positions), (side, side), self.masks.share, self.masks.ratio, rng)


def _stack_images(samples: Sequence[np.ndarray]) -> Tensor:
    """B arrays `[crops, h, w, 3]` to `[crops * B, 3, h, w]`, crop by crop."""
    pixels = np.stack(samples, axis=1)
    return torch.from_numpy(pixels.reshape(-1, *pixels.shape[2:])).permute(0, 3, 1, 2).contiguous()


def _stack(samples: Sequence[np.ndarray]) -> Tensor:
    values = np.stack(samples, axis=1)
    return torch.from_numpy(values.reshape(-1, values.shape[-1]))


@dataclass(frozen=True)
class Place:
    """Where a rank stands in the training: who it is and which step comes next."""

    rank: int
    world_size: int
    micro_batch: int
    accumulation: int
    first_step: int
    steps: int

    def positions(self) -> Iterator[np.ndarray]:
        """The positions of every micro-batch that is still to come."""
        for step in range(self.first_step, self.steps):
            for micro_step in range(self.accumulation):
                yield order.positions_of(
                    step, micro_step, self.rank, self.world_size, self.micro_batch, self.accumulation
                )


def batches(dataset: ViewDataset, place: Place, workers: int) -> Iterator[Batch]:
    """Micro-batches from a place to the end of the training, prepared by `workers` processes (0: in this one)."""
    loader = DataLoader(
        dataset,
        sampler=list(place.positions()),
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # its own: drawing from torch's would shift the stochastic depth of the first step
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
