"""Batches of views from corpora, in an order that is a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from pretrain.data.masks import MaskPlan, batch_masks
from pretrain.data.views import Cut, cut, harmless_shrink


@dataclass
class Batch:
    """One micro-batch of B images with G global and L local crops each, crop by crop: all first ones first."""

    global_crops: Tensor
    """uint8 `[G*B, 3, H, W]`"""
    global_photometric: Tensor
    """float32 `[G*B, 9]`"""
    local_crops: Tensor
    """uint8 `[L*B, 3, h, w]`"""
    local_photometric: Tensor
    """float32 `[L*B, 9]`"""
    masks: Tensor
    """bool `[G*B, patches]`: patch tokens of the global crops hidden from the student"""
    plain_crops: Tensor
    """uint8 `[G*B, 3, H', W']`: the global crops again, larger; none unless they are asked for"""
    texts: Tensor
    """int64 `[B, context]`: token ids of the captions; `[B, 0]` where no objective reads them"""
    positions: Tensor
    """int64 `[B]`: places in the endless run of epochs"""

    def to(self, device: torch.device) -> Batch:
        return Batch(**{each.name: getattr(self, each.name).to(device, non_blocking=True) for each in fields(self)})


class ViewDataset(Dataset[Batch | UserError]):
    """Maps the positions of a micro-batch to its views. Corpora are read one after the other as one."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        views: Views,
        masks: MaskPlan,
        seed: int,
        tokenize: Callable[[Sequence[str]], Tensor] | None = None,
    ) -> None:
        self.corpora = list(corpora)
        self.ends = np.cumsum([len(corpus) for corpus in corpora])
        self.views = views
        self.masks = masks
        self.seed = seed
        self.tokenize = tokenize
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
        samples = [self._sample(int(row)) for row in rows]
        views = [self._views(*sample, int(place)) for sample, place in zip(samples, positions, strict=True)]
        large, small = ([pair[i] for pair in views] for i in (0, 1))
        return Batch(
            global_crops=_stack_images([crops.pixels for crops in large]),
            global_photometric=_stack([crops.photometric for crops in large]),
            local_crops=_stack_images([crops.pixels for crops in small]),
            local_photometric=_stack([crops.photometric for crops in small]),
            plain_crops=_stack_images([crops.plain for crops in large]),
            masks=torch.from_numpy(self._masks(positions)),
            texts=self._texts(samples),
            positions=torch.from_numpy(positions),
        )

    def _sample(self, row: int) -> tuple[Corpus, int]:
        """A row of all corpora as one: the corpus and the row in it."""
        number = int(np.searchsorted(self.ends, row, side="right"))
        return self.corpora[number], row - (int(self.ends[number - 1]) if number else 0)

    def _views(self, corpus: Corpus, row: int, position: int) -> tuple[Cut, Cut]:
        try:
            image = decode_rgb(
                corpus.read_image(row), shrink=lambda width, height: harmless_shrink(width, height, self.views)
            )
        except ImageRejected as error:
            key = corpus.keys[row]
            raise UserError(f"{corpus.artifact.url}: sample {key} is {error.reason} now; ingest it again") from None
        rng = order.generator(self.seed, order.AUGMENTATION, position)
        views = self.views
        return (
            cut(image, views.globals, views.global_count, views, rng, views.plain_size),
            cut(image, views.locals, views.local_count, views, rng),
        )

    def _texts(self, samples: Sequence[tuple[Corpus, int]]) -> Tensor:
        if self.tokenize is None:
            return torch.empty((len(samples), 0), dtype=torch.int64)
        return self.tokenize([corpus.captions[row].as_py() for corpus, row in samples])

    def _masks(self, positions: np.ndarray) -> np.ndarray:
        side = self.views.globals.size // self.masks.patch_size
        rng = order.generator(self.seed, order.MASKS, int(positions[0]))
        return batch_masks(self.views.global_count * len(positions), (side, side), self.masks, rng)


def _stack_images(samples: Sequence[np.ndarray]) -> Tensor:
    """B arrays `[crops, h, w, 3]` to `[crops * B, 3, h, w]`, crop by crop."""
    pixels = np.stack(samples, axis=1)
    return torch.from_numpy(pixels).flatten(0, 1).permute(0, 3, 1, 2).contiguous()


def _stack(samples: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(samples, axis=1)).flatten(0, 1)


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
