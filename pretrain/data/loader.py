"""Batches of views from samples, in an order that is a pure function of the seed and the place in it."""

from __future__ import annotations

import logging
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from infra.corpus.corpus import CHANGED, BadImage
from infra.errors import UserError
from pretrain.data import sample_order
from pretrain.data.config import Sampling, Views
from pretrain.data.decode import REASONS, ImageRejected, decode, open_image, upright_size
from pretrain.data.masks import MaskSettings, batch_masks
from pretrain.data.sample_depth import DepthSettings
from pretrain.data.samples import Samples
from pretrain.data.views import CropSet, extract_crops, safe_draft_scale, sample_crops

BAD_SAMPLE_REASONS = (*REASONS, CHANGED.reason)
"""Why a sample may be passed over."""
_LAST_SECONDS = 120  # a worker that was asked to stop, and is still there, ends after these
_MAX_REPLACEMENTS = 16  # samples tried in the place of one before giving up

_log = logging.getLogger(__name__)


@dataclass
class Batch:
    """One micro-batch of B images with G global and L local crops each, crop by crop: all first ones first."""

    global_crops: Tensor
    """uint8 `[G*B, 3, H, W]`"""
    global_photometric: Tensor
    """float32 `[G*B, 9]`: how they are still to be recolored; no rows where the loader has done it"""
    local_crops: Tensor
    """uint8 `[L*B, 3, h, w]`"""
    local_photometric: Tensor
    """float32 `[L*B, 9]`, likewise"""
    masks: Tensor
    """bool `[G*B, patches]`: patch tokens of the global crops hidden from the student"""
    gram_crops: Tensor
    """uint8 `[G*B, 3, H', W']`: the global crops again, larger; none unless they are asked for"""
    texts: Tensor
    """int64 `[B, context]`: token ids of the captions; `[B, 0]` where no objective reads them"""
    positions: Tensor
    """int64 `[B]`: places in the endless run of epochs"""
    skipped_counts: Tensor
    """int64 `[reasons]`: samples of these places that could not be used, by their reason in `BAD_SAMPLE_REASONS`"""
    mask_indices: Tensor
    """int64 `[n]`: where the masks are true, of all patch tokens one after another; here, so that no device is asked"""
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 `[B]`: classes; `[0]` where no objective reads them"""
    keys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """int64 `[B]`: what the views are a function of, beside the seed; see `ViewDataset`"""

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """In memory that a GPU reads by itself; the loader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(**{each.name: change(getattr(self, each.name)) for each in fields(self)})


class ViewDataset(Dataset[Batch | UserError]):
    """Maps places of the order to their views.

    A sample that cannot be used is passed over: one from another place of the epoch, drawn from seed and place, stands
    in for it.

    Args:
        repeats: views of a sample after which the first one comes again, epoch by epoch: those of row r in epoch e have
            the key r * repeats + e % repeats. 0: no view comes again, and the place is the key.
    """

    def __init__(
        self,
        samples: Samples,
        views: Views,
        masks: MaskSettings,
        seed: int,
        sampling: Sampling | None = None,
        tokenize: Callable[[Sequence[str]], Tensor] | None = None,
        labeled: bool = False,
        repeats: int = 0,
    ) -> None:
        self.samples = samples
        self.order = samples.order(seed, sampling or Sampling())
        self.views = views
        self.masks = masks
        self.seed = seed
        self.tokenize = tokenize
        self.labeled = labeled
        self.repeats = repeats

    def __getitem__(self, positions: np.ndarray) -> Batch | UserError:
        try:
            return self.batch(positions)
        except UserError as error:  # raised across processes it would come wrapped in a traceback
            return error

    def batch(self, positions: np.ndarray) -> Batch:
        """The views of the images at given places."""
        rows = self.order.rows_at(positions)
        if not self.repeats:
            return self._batch(positions, rows, positions)
        return self._batch(positions, rows, rows * self.repeats + positions // self.order.size % self.repeats)

    def batch_of_keys(self, keys: np.ndarray) -> Batch:
        """The views of given keys, where they repeat; their places mean nothing."""
        return self._batch(keys, keys // self.repeats, keys)

    def _batch(self, positions: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> Batch:
        skipped: Counter[str] = Counter()
        views: list[tuple[CropSet, CropSet]] = []
        for at, (place, data) in enumerate(zip(positions, self.samples.read(rows), strict=True)):
            rows[at], cuts = self._find_usable(int(place), int(keys[at]), int(rows[at]), data, skipped)
            views.append(cuts)
        large, small = ([pair[i] for pair in views] for i in (0, 1))
        masks = torch.from_numpy(self._masks(positions))
        return Batch(
            global_crops=_stack_images([crops.pixels for crops in large]),
            global_photometric=_stack([crops.photometric for crops in large]),
            local_crops=_stack_images([crops.pixels for crops in small]),
            local_photometric=_stack([crops.photometric for crops in small]),
            gram_crops=_stack_images([crops.gram_pixels for crops in large]),
            masks=masks,
            mask_indices=masks.flatten().nonzero()[:, 0],
            texts=self._texts(rows),
            labels=self._labels(rows),
            keys=torch.from_numpy(keys),
            positions=torch.from_numpy(positions),
            skipped_counts=torch.tensor([skipped[reason] for reason in BAD_SAMPLE_REASONS]),
        )

    def _find_usable(
        self, position: int, key: int, row: int, data: bytes | BadImage, skipped: Counter[str]
    ) -> tuple[int, tuple[CropSet, CropSet]]:
        """The row and the views of a place: of the first usable one of its sample and the substitutes."""
        rng = sample_order.generator(self.seed, sample_order.SUBSTITUTES, key)
        for _ in range(_MAX_REPLACEMENTS):
            try:
                if isinstance(data, BadImage):
                    raise ImageRejected(data.reason)
                return row, self._views(data, key, self.samples.depth(row))
            except ImageRejected as error:
                skipped[error.reason] += 1
                _log.info("sample %s is passed over: %s", self.samples.key(row), error.reason)
            row = int(rng.integers(self.order.size)) if self.repeats else self.order.replacement_row(position, rng)
            (data,) = self.samples.read(np.array([row]))
        reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.items())
        url = self.samples.locate(row)[0].artifact.url
        raise UserError(f"{url}: {_MAX_REPLACEMENTS} samples in a row cannot be used ({reasons}); ingest it again")

    def _views(self, data: bytes, key: int, depth: DepthSettings) -> tuple[CropSet, CropSet]:
        """Global and local crops, chosen by the image's dimensions before a pixel is decoded.

        Raises:
            ImageRejected: the image cannot be used.
        """
        image, views = open_image(data), self.views
        size = upright_size(image)
        rng = sample_order.generator(self.seed, sample_order.AUGMENTATION, key)
        large = sample_crops(size, views.global_crops, views.num_global_crops, views, rng)
        small = sample_crops(size, views.local_crops, views.num_local_crops, views, rng)
        sizes = (max(views.global_crops.size, views.gram_crop_size or 0), views.local_crops.size)
        factor = safe_draft_scale(
            [(crop, side) for crops, side in zip((large, small), sizes, strict=True) for crop in crops]
        )
        pixels = np.array(decode(image, factor, depth=depth))
        return (
            extract_crops(pixels, size, large, views.global_crops.size, views, views.gram_crop_size),
            extract_crops(pixels, size, small, views.local_crops.size, views),
        )

    def _texts(self, rows: np.ndarray) -> Tensor:
        if self.tokenize is None:
            return torch.empty((len(rows), 0), dtype=torch.int64)
        return self.tokenize([self.samples.caption(int(row)) for row in rows])

    def _labels(self, rows: np.ndarray) -> Tensor:
        labels = [self.samples.label(int(row)) for row in rows] if self.labeled else []
        return torch.tensor(labels, dtype=torch.int64)

    def _masks(self, positions: np.ndarray) -> np.ndarray:
        side = self.views.global_crops.size // self.masks.patch_size
        rng = sample_order.generator(self.seed, sample_order.MASKS, int(positions[0]))
        return batch_masks(self.views.num_global_crops * len(positions), (side, side), self.masks, rng)


def _stack_images(samples: Sequence[np.ndarray]) -> Tensor:
    """B arrays `[crops, h, w, 3]` to `[crops * B, 3, h, w]`, crop by crop."""
    pixels = np.stack(samples, axis=1)
    return torch.from_numpy(pixels).flatten(0, 1).permute(0, 3, 1, 2).contiguous()


def _stack(samples: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(samples, axis=1)).flatten(0, 1)


@dataclass(frozen=True)
class RankBatchSampler:
    """Where a rank stands in the training: who it is, which step comes next, what all ranks together have seen."""

    rank: int
    world_size: int
    micro_batch: int
    accumulation: int
    first_step: int
    steps: int
    samples_seen: int = 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulation

    def __iter__(self) -> Iterator[np.ndarray]:
        """The places of every micro-batch that is still to come."""
        global_batch = self.world_size * self.accumulation * self.micro_batch
        for step in range(self.steps - self.first_step):
            for micro_step in range(self.accumulation):
                first = self.samples_seen + step * global_batch
                yield sample_order.positions_of_rank(first, micro_step, self.rank, self.world_size, self.micro_batch)


def batches(dataset: ViewDataset, sampler: RankBatchSampler, workers: int) -> Iterator[Batch]:
    """Micro-batches from a place to the end of the training, prepared by `workers` processes (0: in this one)."""
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=False,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # its own: drawing from torch's would shift the stochastic depth of the first step
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _init_worker(worker: int) -> None:
    torch.set_num_threads(1)
    _drop_inherited_exit_calls()
    # SLURM asks all processes of a job to stop, while the trainer still needs its data to finish a step.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LAST_SECONDS))
    for number in (signal.SIGUSR1, signal.SIGINT):  # a terminal sends Ctrl-C to all of them
        signal.signal(number, signal.SIG_IGN)


def _drop_inherited_exit_calls() -> None:
    """Forget what the parent's threads asked for at exit, but for thread pools.

    Those threads do not exist in a forked process. Prefect 3.8 resets its services there and leaves their calls, which
    then fail: the worker would end with exit code 1, and the loader report that it "exited unexpectedly".
    """
    calls = threading._threading_atexits  # type: ignore[attr-defined]
    calls[:] = [call for call in calls if (call.func.__module__ or "").startswith("concurrent.futures")]
