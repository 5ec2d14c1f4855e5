"""Losses that see the whole batch: two ranks with half of it each give the value and gradients of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pretrain.objectives.centering import TeacherTargets, sinkhorn_knopp
from pretrain.objectives.config import ClipConfig, SiglipConfig, TextTower
from pretrain.objectives.image_text import Clip, Siglip
from pretrain.objectives.koleo import koleo
from tests.daemons import free_ports
from tests.test_pretrain_objectives import made

pytestmark = pytest.mark.multiprocess

TEXT = TextTower(context=8, width=16, num_heads=2, layers=1)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (F.normalize(torch.randn(8, 16, generator=generator), dim=1) for _ in range(2))
    return first, second


def clip(first: Tensor, second: Tensor) -> Tensor:
    return made(Clip, ClipConfig(embed_dim=16, text=TEXT)).contrast(first, second)["clip"]


def siglip(first: Tensor, second: Tensor) -> Tensor:
    return made(Siglip, SiglipConfig(embed_dim=16, text=TEXT)).contrast(first, second)["siglip"]


def spread(first: Tensor, second: Tensor) -> Tensor:
    return koleo(first, distributed=True)


def sinkhorn(first: Tensor, second: Tensor) -> Tensor:
    return -(sinkhorn_knopp(second, 0.1) * first.log_softmax(-1)).sum(-1).mean()


def centered(first: Tensor, second: Tensor) -> Tensor:
    targets = TeacherTargets(16, "softmax")
    targets(second, 0.1)
    targets.begin_step()
    return -(targets(second, 0.1) * first.log_softmax(-1)).sum(-1).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "clip": clip,
    "siglip": siglip,
    "koleo": spread,
    "sinkhorn": sinkhorn,
    "centered": centered,
}


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for name, loss in LOSSES.items():
        first, second = (whole.chunk(2)[rank].clone().requires_grad_() for whole in data())
        value = loss(first, second)
        value.backward()
        found[name] = {"loss": value.detach(), "gradient": first.grad}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()  # who leaves while the other still talks to it may be aborted
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    (port,) = free_ports(1)
    torch.multiprocessing.spawn(_rank, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_are_one(name: str, ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    first, second = data()
    first.requires_grad_()
    loss = LOSSES[name](first, second)
    loss.backward()
    mean = torch.stack([rank[name]["loss"] for rank in ranks]).mean()
    torch.testing.assert_close(mean, loss.detach(), rtol=1e-5, atol=1e-6)
    gradients = torch.cat([rank[name]["gradient"] for rank in ranks]) / 2  # the engine averages over ranks
    assert first.grad is not None
    torch.testing.assert_close(gradients, first.grad, rtol=1e-4, atol=1e-6)
