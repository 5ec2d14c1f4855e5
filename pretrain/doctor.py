"""GPUs and the kernels that a training runs on: small products, compared with plain ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from infra.doctor.finding import Finding, guarded, ok, warn
from pretrain.distributed import device_of_rank, init_process_group
from pretrain.models.attention import get_attention
from pretrain.planning import hardware

_CLOSE = 2e-2


def gpus() -> Iterator[Finding]:
    """Every GPU, and what a float of it is worth."""
    if not torch.cuda.is_available():
        yield warn("gpu", f"none; torch {torch.__version__} on the CPU", "for a GPU check nvidia-smi and the driver")
        return
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        known = hardware.find_gpu_name(found.name)
        peak = f", {known.bf16:,.0f} TFLOP/s in bf16 by its data sheet" if known else ""
        yield ok(f"gpu {number}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB{peak}")


def kernels() -> Iterator[Finding]:
    """Attention by each backend, DeepSpeed, and messages between ranks."""
    yield guarded("attention sdpa", lambda: _attention("sdpa"), "install torch again")
    if torch.cuda.is_available():
        yield guarded(
            "attention xformers", lambda: _attention("xformers"), "pip install 'fovea[gpu]', or stay with sdpa"
        )
    yield guarded("deepspeed", _deepspeed, "install deepspeed under constraints.txt, or sharding.backend torch")
    yield guarded("messages", _messages, "see that torch was built with it, and that loopback is up")


def _attention(backend: str) -> Finding:
    device = device_of_rank()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    qkv = torch.randn(2 * 17 + 3 * 5, 3, 4, 32, device=device, dtype=dtype)
    shapes = [(2, 17), (3, 5)]
    found, plain = get_attention(backend)(qkv, shapes, None), get_attention("reference")(qkv, shapes, None)  # type: ignore[arg-type]
    gap = float((found.float() - plain.float()).abs().max())
    name = f"attention {backend}"
    if gap > _CLOSE:
        return warn(name, f"differs from plain products by {gap:.1e}", "use another model.attention")
    return ok(name, f"agrees with plain products to {gap:.0e} on {device.type}")


def _deepspeed() -> Finding:
    from pretrain.sharding.deepspeed_engine import import_deepspeed

    return ok("deepspeed", f"{import_deepspeed(device_of_rank()).__version__} can be imported")


def _messages() -> Finding:
    """A sum over a process group of this process alone, by NCCL where there is a GPU."""
    if dist.is_initialized():
        return ok("messages", f"{dist.get_backend()}, in use")
    device = device_of_rank()
    init_process_group(device)
    try:
        dist.all_reduce(torch.ones(1, device=device))
        return ok("messages", f"{dist.get_backend()} works in one process")
    finally:
        dist.destroy_process_group()
