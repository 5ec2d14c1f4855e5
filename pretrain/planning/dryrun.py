"""What a step costs, found by running it on tensors that have shapes and no values.

The learner itself runs, forward and backward, so whatever is in the settings is in the cost: objectives, stochastic
depth, checkpointing, precision. It takes seconds for the largest models and no memory.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import PretrainSettings, TrainingSettings
from pretrain.data.color_gpu import neutral_parameters
from pretrain.data.loader import BAD_SAMPLE_REASONS, Batch
from pretrain.data.masks import MaskSettings, batch_masks
from pretrain.distributed import without_communication
from pretrain.models.attention import get_attention
from pretrain.models.blocks import Attention
from pretrain.models.execution import Execution
from pretrain.objectives.config import ClipConfig, SiglipConfig
from pretrain.train_module import TrainModule


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters."""

    backbone: int
    trained: int
    """With heads."""
    total: int
    """With teacher, teacher heads and anchors."""


class _NothingToMend(TorchFunctionMode):
    """Says no where torch asks whether some initial value is out of range and must be drawn again."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return False if function is Tensor.__bool__ else function(*args, **(kwargs or {}))


class LiveTensors(TorchDispatchMode):
    """Adds up the bytes of the storages that live, at each moment.

    Args:
        apart: tensors that do not count.
    """

    def __init__(self, apart: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known = {each.untyped_storage()._cdata for each in apart}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def count_parameters(learner: TrainModule) -> ParameterCounts:
    """Numbers of parameters of student, teacher and heads."""
    return ParameterCounts(
        backbone=sum(_count(part.student) for part in learner.branches()),
        trained=sum(each.numel() for each in learner.parameters() if each.requires_grad),
        total=_count(learner),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def build_on_meta(build: Callable[[], TrainModule]) -> TrainModule:
    """A learner without values, at no cost of memory."""
    with torch.device("meta"), _NothingToMend(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that are given to what has none
        learner = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        return learner.to_empty(device="cpu")


def count_flops(learner: TrainModule, settings: PretrainSettings, images: int) -> int:
    """FLOPs of a micro-batch, forward and backward, teacher included; what checkpointing computes again does not count.

    Args:
        learner: with values or without; it stays as it is.
    """
    return count_batch_flops(learner, settings, make_batch(settings, images))


def count_batch_flops(learner: TrainModule, settings: TrainingSettings, batch: Batch) -> int:
    """What `count_flops` gives, of a batch that is there; its values are not read."""
    with _shapes(learner, settings, Execution()) as shapes, FlopCounterMode(display=False) as counter:
        _step(shapes, batch)
    return int(counter.get_total_flops())


def measure_peak(learner: TrainModule, settings: PretrainSettings, images: int) -> int:
    """Bytes at the fullest moment of a micro-batch's two passes, without parameters and gradients, of a rank that holds
    the whole model."""
    execution = Execution(settings.runtime.activation_checkpointing)
    with _shapes(learner, settings, execution) as shapes:
        for parameter in shapes.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # there before: what comes after is activations
        gradients = [each.grad for each in shapes.parameters() if each.grad is not None]
        batch = make_batch(settings, images)
        with LiveTensors([*shapes.parameters(), *shapes.buffers(), *gradients]) as living:
            _step(shapes, batch)
    return living.peak


@contextmanager
def _shapes(learner: TrainModule, settings: TrainingSettings, execution: Execution) -> Iterator[TrainModule]:
    """A copy without values, as it is at the end of the training, when every objective has begun."""
    mode = next((each.fake_mode for each in learner.parameters() if isinstance(each, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    with mode, without_communication():
        with FakeCopyMode(mode):
            shapes = copy.deepcopy(learner).train()
        for module in shapes.modules():
            if isinstance(module, Attention):
                module.attention = get_attention("sdpa")  # other backends have no kernels for tensors without values
        shapes.precision = settings.sharding.precision
        shapes.set_execution(execution)
        shapes.begin_step(settings.schedule.steps - 1)
        yield shapes


def _step(learner: TrainModule, batch: Batch) -> None:
    loss, _ = learner(batch, 0.05)
    loss.backward()


def make_batch(settings: PretrainSettings, images: int) -> Batch:
    """A batch of the shapes that some images have; its values mean nothing."""
    views, patch = settings.views, settings.model.patch_size
    large, small = views.num_global_crops * images, views.num_local_crops * images
    side = views.global_crops.size // patch
    masks = batch_masks(large, (side, side), MaskSettings.from_config(views, patch), np.random.default_rng(0))
    captioned = [each for each in settings.objectives if isinstance(each, ClipConfig | SiglipConfig)]
    context = captioned[0].text.context if captioned else 0
    plain = views.gram_crop_size or 0

    def crops(count: int, size: int) -> Tensor:
        return torch.empty((count if size else 0, 3, size, size), dtype=torch.uint8)

    uncolored = torch.empty(0, len(neutral_parameters()))  # recoloring multiplies no matrices
    return Batch(
        global_crops=crops(large, views.global_crops.size),
        global_photometric=uncolored,
        local_crops=crops(small, views.local_crops.size if small else 0),
        local_photometric=uncolored,
        masks=torch.empty(masks.shape, dtype=torch.bool),
        gram_crops=crops(large, plain),
        texts=torch.empty((images, context), dtype=torch.int64),
        positions=torch.empty(images, dtype=torch.int64),
        skipped_counts=torch.empty(len(BAD_SAMPLE_REASONS), dtype=torch.int64),
        mask_indices=torch.empty(int(masks.sum()), dtype=torch.int64),
    )
