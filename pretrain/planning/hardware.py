"""What devices can do: published dense peaks, and this machine's own."""

from __future__ import annotations

import re
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
    watts: int
    """Largest power of the board"""


GPUS = {
    "a100-40gb": Gpu(40, 312, 19.5, 400),
    "a100": Gpu(80, 312, 19.5, 400),
    "h100-pcie": Gpu(80, 756, 51, 350),
    "h100": Gpu(80, 989, 67, 700),
    "h200": Gpu(141, 989, 67, 700),
    "b200": Gpu(180, 2250, 75, 1000),
    "l40s": Gpu(48, 362, 91.6, 350),
    "l4": Gpu(24, 121, 30.3, 72),
    "a10g": Gpu(24, 70, 31.2, 300),
    "rtx4090": Gpu(24, 165, 82.6, 450),
    "rtx3090": Gpu(24, 71, 35.6, 350),
}
_SIDES = {"cuda": 8192, "cpu": 1024}  # of the matrices that are multiplied to see what a device reaches
_ROUNDS = 5  # the first of them warms up


def gpu(name: str) -> Gpu:
    """A GPU of the table.

    Raises:
        UserError: it is not in it.
    """
    if name.lower() not in GPUS:
        raise UserError(f"gpu: {name} is unknown; give one of {', '.join(GPUS)}, or gib and tflops")
    return GPUS[name.lower()]


def find_gpu_name(device: str) -> Gpu | None:
    """The GPU of the table that has a device's name, as CUDA gives it; None where none has."""
    words = set(re.findall(r"[a-z]*[0-9]+[a-z]*|[a-z]+", device.lower().replace("rtx ", "rtx")))
    found = [name for name in GPUS if set(name.split("-")) <= words]
    return GPUS[max(found, key=len)] if found and "nvl" not in words else None


def peak_flops(device: torch.device, precision: Precision) -> float:
    """FLOP/s that a device can reach: by its data sheet if it is known, else those of its best matrix product."""
    if device.type == "cuda":
        known = find_gpu_name(torch.cuda.get_device_name(device))
        if known is not None:
            return 1e12 * (known.bf16 if precision == "bf16" else known.fp32)
    return _measured(device, torch.bfloat16 if precision == "bf16" and device.type == "cuda" else torch.float32)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDES[device.type]
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    best = 0.0
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best
