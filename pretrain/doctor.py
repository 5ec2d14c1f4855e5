"""GPUs and the kernels that a training runs on: small products, compared with plain ones."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from infra.doctor.finding import Finding, guarded, ok, warn
from pretrain.models.attention import attention
from pretrain.planning import hardware

_CLOSE = 2e-2


def gpus() -> Iterator[Finding]:
    """Every GPU, and what a float of it is worth."""
    if not torch.cuda.is_available():
        yield warn("gpu", f"none; torch {torch.__version__} on the CPU", "for a GPU check nvidia-smi and the driver")
        return
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        known = hardware.named(found.name)
        peak = f", {known.bf16:,.0f} TFLOP/s in bf16 by its data sheet" if known else ""
        yield ok(f"gpu {number}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB{peak}")


def kernels() -> Iterator[Finding]:
    """Attention by each backend, DeepSpeed, and messages between ranks."""
    yield guarded("attention sdpa", lambda: _attention("sdpa"), "install torch again")
    if torch.cuda.is_available():
        yield guarded(
            "attention xformers", lambda: _attention("xformers"), "pip install 'fovea[gpu]', or stay with sdpa"
        )
    yield guarded("deepspeed", _deepspeed, "install deepspeed under constraints.txt, or sharding.engine torch")
    yield guarded("messages", _messages, "see that torch was built with it, and that loopback is up")


def _attention(backend: str) -> Finding:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    qkv = torch.randn(2 * 17 + 3 * 5, 3, 4, 32, device=device, dtype=dtype)
    shapes = [(2, 17), (3, 5)]
    found, plain = attention(backend)(qkv, shapes, None), attention("reference")(qkv, shapes, None)  # type: ignore[arg-type]
    gap = float((found.float() - plain.float()).abs().max())
    name = f"attention {backend}"
    if gap > _CLOSE:
        return warn(name, f"differs from plain products by {gap:.1e}", "use another model.attention")
    return ok(name, f"agrees with plain products to {gap:.0e} on {device.type}")


def _deepspeed() -> Finding:
    from pretrain.sharding.zero import import_deepspeed

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return ok("deepspeed", f"{import_deepspeed(device).__version__} can be imported")


def _messages() -> Finding:
    """A sum over a process group of this process alone, by NCCL where there is a GPU."""
    if dist.is_initialized():
        return ok("messages", f"{dist.get_backend()}, in use")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        value = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(value)
        return ok("messages", f"{backend} works in one process")
    finally:
        dist.destroy_process_group()
