"""What devices can do: published dense peaks, and this machine's own."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from infra.errors import UserError
from pretrain.config import Precision


@dataclass(frozen=True)
class Gpu:
    """One GPU, by its maker's data sheet."""

    memory: float
    """GiB"""
    bf16: float
    """TFLOP/s of dense bf16 matrix products"""
    fp32: float
    """TFLOP/s of float32 products, without TF32"""


GPUS = {
    "a100-40gb": Gpu(40, 312, 19.5),
    "a100": Gpu(80, 312, 19.5),
    "h100-pcie": Gpu(80, 756, 51),
    "h100": Gpu(80, 989, 67),
    "h200": Gpu(141, 989, 67),
    "b200": Gpu(180, 2250, 75),
    "l40s": Gpu(48, 362, 91.6),
    "l4": Gpu(24, 121, 30.3),
    "a10g": Gpu(24, 70, 31.2),
    "rtx4090": Gpu(24, 165, 82.6),
    "rtx3090": Gpu(24, 71, 35.6),
}
_SIDE = 1024  # of the matrices that are multiplied to see what a device reaches
_ROUNDS = 5


def gpu(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        UserError: it is not in it.
    """
    if name.lower() not in GPUS:
        raise UserError(f"gpu: {name} is not known; give one of {', '.join(GPUS)}, or memory and tflops")
    return GPUS[name.lower()]


def peak(device: torch.device, precision: Precision) -> float:
    """FLOP/s that a device can reach: by its data sheet if it is known, else those of its best matrix product."""
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device).lower().replace("geforce ", "").replace(" ", "-")
        known = [each for name, each in GPUS.items() if name.replace("rtx", "rtx-") in words]
        if known:
            return 1e12 * (known[-1].bf16 if precision == "bf16" else known[-1].fp32)
    return _measured(device, torch.bfloat16 if precision == "bf16" and device.type == "cuda" else torch.float32)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    best = 0.0
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        best = max(best, 2 * _SIDE**3 / (time.perf_counter() - started))
    return best
