"""One step of DINO + iBOT + KoLeo, forward and backward, teacher included: work, memory and time.

ViT-S/16, 4 images of 2 x 224 and 8 x 96 px, 8,192 prototypes, stochastic depth 0.3. FLOPs are torch's counter's, saved
bytes those of the storages kept for the backward pass, parameters apart; peak memory is the resident memory that the
first step adds, in a process of its own. The reference's figures are DINOv2's official code in this setting, counted in
the same way (339.0 GFLOP, 750 MB). The peer in time and peak memory is lightly, whose parts are put together as its
documentation does for DINOv2; on one core.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import Row, compared, cpu_seconds, main
from benchmarks.saved_tensors import kept_for_backward
from pretrain.config import PretrainSettings
from pretrain.data.color_gpu import neutral_parameters
from pretrain.data.loader import Batch
from pretrain.data.masks import MaskSettings, batch_masks
from pretrain.models.execution import Checkpointing, Execution
from pretrain.train import build_module
from pretrain.train_module import TrainModule

IMAGES, LOCALS, PROTOTYPES, DROP = 4, 8, 8192, 0.3
REFERENCE_GFLOP, REFERENCE_MB = 339.0, 750.0
_HEAD = {"hidden_dim": 2048, "bottleneck_dim": 256, "num_prototypes": PROTOTYPES}
SETTINGS = PretrainSettings.model_validate(
    {
        "model": {"size": "small", "patch_size": 16, "image_size": 224, "drop_path_rate": DROP},
        "objectives": [{"kind": "dino", "head": _HEAD}, {"kind": "ibot", "head": _HEAD}, {"kind": "koleo"}],
    }
)


def batch_of_noise() -> Batch:
    rng = np.random.default_rng(0)
    sizes = ((2 * IMAGES, 224), (LOCALS * IMAGES, 96))
    crops = [torch.from_numpy(rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8)) for n, side in sizes]
    colors = [torch.from_numpy(np.tile(neutral_parameters(), (n, 1))) for n, _ in sizes]
    plan = MaskSettings(patch_size=16, probability=0.5, ratio=(0.1, 0.5), exact=True, shift=False)
    masks = torch.from_numpy(batch_masks(2 * IMAGES, (14, 14), plan, rng))
    masked, none = masks.flatten().nonzero()[:, 0], torch.empty(0)
    return Batch(crops[0], colors[0], crops[1], colors[1], masks, none, none, torch.arange(IMAGES), none, masked)


@dataclass
class Counted:
    gigaflops: float
    megabytes: float


def counted(learner: TrainModule, batch: Batch, checkpointing: Checkpointing) -> Counted:
    """FLOPs of a whole step, and what the backward pass finds kept."""
    learner.student.execution = Execution(checkpointing)
    with FlopCounterMode(display=False) as flops:
        with kept_for_backward(learner) as kept:
            loss, _ = learner(batch, 0.05)
        loss.backward()
    learner.zero_grad()
    learner.student.execution = Execution()
    return Counted(flops.get_total_flops() / 1e9, kept.bytes / 1e6)


def ours(learner: TrainModule, batch: Batch) -> None:
    loss, _ = learner(batch, 0.05)
    loss.backward()
    learner.zero_grad()


def lightlys(batch: Batch) -> Callable[[], None]:
    """The same step of lightly's parts: one pass for each crop size, projection heads, three losses."""
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM

    def backbone(drop: float) -> MaskedVisionTransformerTIMM:
        vit = timm.create_model(
            "vit_small_patch16_224", num_classes=0, init_values=1e-5, dynamic_img_size=True, drop_path_rate=drop
        )
        return MaskedVisionTransformerTIMM(vit=vit)

    def heads() -> nn.ModuleList:
        return nn.ModuleList(DINOProjectionHead(384, 2048, 256, PROTOTYPES) for _ in range(2))

    student, teacher = backbone(DROP).train(), backbone(0.0).eval()
    (head, patch_head), (teacher_head, teacher_patch_head) = heads(), heads()
    dino, ibot, koleo = DINOLoss(PROTOTYPES), IBOTPatchLoss(PROTOTYPES), KoLeoLoss()
    mask = torch.zeros(2 * IMAGES, 197, dtype=torch.bool)
    mask[:, 1:] = batch.masks

    def step() -> None:
        large, small = batch.global_crops.float() / 255, batch.local_crops.float() / 255
        with torch.no_grad():
            seen = teacher.encode(large)
            targets = teacher_head(seen[:, 0]).chunk(2)
            patch_targets = teacher_patch_head(seen[mask])
        tokens = student.encode(large, mask=mask)
        logits = [*head(tokens[:, 0]).chunk(2), *head(student.encode(small)[:, 0]).chunk(LOCALS)]
        loss = dino(list(targets), logits, teacher_temp=0.05)
        loss = loss + ibot(patch_targets, patch_head(tokens[mask]), batch.masks.unflatten(1, (14, 14)), 0.05)
        loss = loss + 0.1 * sum(koleo(crop) for crop in tokens[:, 0].chunk(2))
        loss.backward()
        for module in (student, head, patch_head):
            module.zero_grad()

    return step


def _peak(which: str, answer: Any) -> None:
    """In a process of its own: MB by which a step raises the resident memory above what the model itself takes."""
    torch.set_num_threads(1)
    batch = batch_of_noise()
    if which == "lightly":
        step = lightlys(batch)
    else:
        learner = build_module(SETTINGS).train()
        learner.student.execution = Execution("full" if which == "full" else "none")
        step = partial(ours, learner, batch)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of imports and of building
    step()
    status = Path("/proc/self/status").read_text()
    answer.put((int(status.split("VmHWM:")[1].split()[0]) * 1024 - before) / 1e6)


def peak_megabytes(which: str) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_peak, args=(which, answer))
    process.start()
    value: float = answer.get()
    process.join()
    return value


def measure() -> list[Row]:
    torch.set_num_threads(1)
    learner, batch = build_module(SETTINGS).train(), batch_of_noise()
    learner.begin_step(0)
    plain, full = (counted(learner, batch, checkpointing) for checkpointing in ("none", "full"))
    rows = [
        compared("FLOPs (peer: DINOv2)", plain.gigaflops, REFERENCE_GFLOP, "GFLOP", target=1.0),
        compared("saved bytes (peer: DINOv2)", plain.megabytes, REFERENCE_MB, "MB", target=REFERENCE_MB / 560),
        compared("saved bytes, full checkpointing (peer: without)", full.megabytes, plain.megabytes, "MB", target=3.0),
        compared("FLOPs, full checkpointing (peer: without)", full.gigaflops, plain.gigaflops, "GFLOP"),
    ]
    try:
        peer = lightlys(batch)
    except ImportError:
        print("lightly is not installed, so no time is compared; pip install 'fovea[dev]'")
        return rows
    peaks = {which: peak_megabytes(which) for which in ("plain", "full", "lightly")}
    mine, theirs = cpu_seconds(lambda: ours(learner, batch), peer, repeats=3)
    return [
        *rows,
        compared("peak memory of a step (peer: lightly)", peaks["plain"], peaks["lightly"], "MB"),
        compared("peak memory, full checkpointing (peer: without)", peaks["full"], peaks["plain"], "MB"),
        compared("time of a step (peer: lightly)", mine, theirs, "CPU s", target=1.3),
    ]


if __name__ == "__main__":
    main("A DINOv2 step: ViT-S/16, 4 images", measure)
