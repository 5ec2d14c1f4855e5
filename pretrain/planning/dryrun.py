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
from pretrain.data.loader import UNUSABLE, Batch
from pretrain.data.masks import MaskPlan, batch_masks
from pretrain.data.photometric import neutral
from pretrain.learner import Learner
from pretrain.models.attention import attention
from pretrain.models.blocks import Attend
from pretrain.models.execution import Execution
from pretrain.objectives.config import ClipConfig, SiglipConfig
from pretrain.ranks import alone


@dataclass(frozen=True)
class Size:
    """Numbers of parameters."""

    backbone: int
    trained: int
    """With heads."""
    whole: int
    """With teacher, teacher heads and anchors."""


class _NothingToMend(TorchFunctionMode):
    """Says no where torch asks whether some initial value is out of range and must be drawn again."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return False if function is Tensor.__bool__ else function(*args, **(kwargs or {}))


class _Living(TorchDispatchMode):
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


def size(learner: Learner) -> Size:
    """Numbers of parameters of student, teacher and heads."""
    return Size(
        backbone=sum(_count(part.student) for part in learner.parts()),
        trained=sum(each.numel() for each in learner.parameters() if each.requires_grad),
        whole=_count(learner),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def shapes_of(build: Callable[[], Learner]) -> Learner:
    """A learner without values, at no cost of memory."""
    with torch.device("meta"), _NothingToMend(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that are given to what has none
        learner = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        return learner.to_empty(device="cpu")


def flops(learner: Learner, settings: PretrainSettings, images: int) -> int:
    """FLOPs of a micro-batch, forward and backward, teacher included; what checkpointing computes again does not count.

    Args:
        learner: with values or without; it stays as it is.
    """
    return flops_of(learner, settings, batch_of(settings, images))


def flops_of(learner: Learner, settings: TrainingSettings, batch: Batch) -> int:
    """What `flops` gives, of a batch that is there; its values are not read."""
    with _shapes(learner, settings, Execution()) as shapes, FlopCounterMode(display=False) as counter:
        _step(shapes, batch)
    return int(counter.get_total_flops())


def peak(learner: Learner, settings: PretrainSettings, images: int) -> int:
    """Bytes at the fullest moment of a micro-batch's two passes, without parameters and gradients, of a rank that holds
    the whole model."""
    execution = Execution(settings.runtime.activation_checkpointing)
    with _shapes(learner, settings, execution) as shapes:
        for parameter in shapes.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # there before: what comes after is activations
        gradients = [each.grad for each in shapes.parameters() if each.grad is not None]
        batch = batch_of(settings, images)
        with _Living([*shapes.parameters(), *shapes.buffers(), *gradients]) as living:
            _step(shapes, batch)
    return living.peak


@contextmanager
def _shapes(learner: Learner, settings: TrainingSettings, execution: Execution) -> Iterator[Learner]:
    """A copy without values, as it is at the end of the training, when every objective has begun."""
    mode = next((each.fake_mode for each in learner.parameters() if isinstance(each, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    with mode, alone():
        with FakeCopyMode(mode):
            shapes = copy.deepcopy(learner).train()
        for module in shapes.modules():
            if isinstance(module, Attend):
                module.attention = attention("sdpa")  # other backends have no kernels for tensors without values
        shapes.precision = settings.sharding.precision
        shapes.execute(execution)
        shapes.begin_step(settings.schedule.steps - 1)
        yield shapes


def _step(learner: Learner, batch: Batch) -> None:
    loss, _ = learner(batch, 0.05)
    loss.backward()


def batch_of(settings: PretrainSettings, images: int) -> Batch:
    """A batch of the shapes that some images have; its values mean nothing."""
    views, patch = settings.views, settings.model.patch_size
    large, small = views.num_global_crops * images, views.num_local_crops * images
    side = views.global_crops.size // patch
    masks = batch_masks(large, (side, side), MaskPlan.of(views, patch), np.random.default_rng(0))
    captioned = [each for each in settings.objectives if isinstance(each, ClipConfig | SiglipConfig)]
    context = captioned[0].text.context if captioned else 0
    plain = views.gram_crop_size or 0

    def crops(count: int, size: int) -> Tensor:
        return torch.empty((count if size else 0, 3, size, size), dtype=torch.uint8)

    uncoloured = torch.empty(0, len(neutral()))  # recolouring multiplies no matrices
    return Batch(
        global_crops=crops(large, views.global_crops.size),
        global_photometric=uncoloured,
        local_crops=crops(small, views.local_crops.size if small else 0),
        local_photometric=uncoloured,
        masks=torch.empty(masks.shape, dtype=torch.bool),
        plain_crops=crops(large, plain),
        texts=torch.empty((images, context), dtype=torch.int64),
        positions=torch.empty(images, dtype=torch.int64),
        passed_over=torch.empty(len(UNUSABLE), dtype=torch.int64),
        masked=torch.empty(int(masks.sum()), dtype=torch.int64),
    )
