"""The state of a training, parameter by parameter and whole: any engine on any number of ranks can go on from it.

Each rank writes a part of the tensors. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from infra.errors import UserError
from pretrain.distributed import rank_and_world_size
from pretrain.sharding.base import MOMENTS, Backend

_INDEX = "state.json"
_VALUE = "value"


@dataclass(frozen=True)
class RankState:
    """What one rank writes of a state: copies on the CPU."""

    rank: int
    tensors: dict[str, Tensor]
    owners: dict[str, int]
    """The rank that writes each tensor of the whole state."""
    optimizer_steps: int


def collect(backend: Backend) -> RankState:
    """This rank's part of parameters, buffers and the optimizer's moments; called on all ranks."""
    rank, world_size = rank_and_world_size()
    mine: dict[str, Tensor] = {}
    owners: dict[str, int] = {}
    filled = [0] * world_size
    for name, tensor in _tensors(backend):
        owner = filled.index(min(filled))
        filled[owner] += tensor.nbytes
        owners[name] = owner
        if owner == rank:
            mine[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return RankState(rank, mine, owners, backend.optimizer_steps)


def write(rank_state: RankState, directory: Path) -> list[Path]:
    """Write a part; return its files."""
    paths = [directory / _file_name(rank_state.rank)]
    save_file(rank_state.tensors, paths[0])
    if rank_state.rank == 0:
        paths.append(directory / _INDEX)
        paths[1].write_text(json.dumps({"optimizer_steps": rank_state.optimizer_steps, "owners": rank_state.owners}))
    return paths


def load(backend: Backend, directory: Path) -> None:
    """Read what `write` wrote, on any number of ranks.

    Raises:
        UserError: the state is of other modules.
    """
    index = json.loads((directory / _INDEX).read_text())
    owners: dict[str, int] = index["owners"]
    parameters, buffers = dict(backend.module.named_parameters()), dict(backend.module.named_buffers())
    if {name for name in owners if name.startswith(_VALUE)} != {
        f"{_VALUE}/{name}" for name in backend.module.state_dict()
    }:
        raise UserError(f"{directory}: holds the state of another model or objectives; choose another --out")
    moved = [name.split("/", 1)[1] for name in owners if name.startswith(f"{MOMENTS[0]}/")]
    backend.expect_moments([parameters[name] for name in moved], index["optimizer_steps"])
    with ExitStack() as stack:
        files = {
            part: stack.enter_context(safe_open(directory / _file_name(part), framework="pt"))
            for part in set(owners.values())
        }
        for full_name, part in owners.items():
            kind, name = full_name.split("/", 1)
            value = files[part].get_tensor(full_name)
            if name in buffers:
                buffers[name].copy_(value)
            else:
                backend.set_param(parameters[name], value, next((each for each in MOMENTS if each == kind), None))


def full_state_dict(backend: Backend, prefix: str = "") -> dict[str, Tensor]:
    """The module's state dict, or of one of its modules, whole, on the first rank; elsewhere it is empty. Called on
    all ranks."""
    found = {}
    for name, tensor in _values(backend, prefix):
        if rank_and_world_size()[0] == 0:
            found[name.removeprefix(prefix)] = tensor.detach().cpu().contiguous()
    return found


def _file_name(rank: int) -> str:
    return f"state-{rank:05d}.safetensors"


def _values(backend: Backend, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """What a state dict holds, in its order; parameters that are used twice come once."""
    parameters = dict(backend.module.named_parameters())
    for name, value in backend.module.state_dict().items():
        if name.startswith(prefix):
            yield name, backend.full_param(parameters[name]) if name in parameters else value


def _tensors(backend: Backend) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(backend.module.named_parameters())
    for name, value in _values(backend):
        yield f"{_VALUE}/{name}", value
        if name in parameters and parameters[name].requires_grad:
            for which in MOMENTS:
                moment = backend.moment(parameters[name], which)
                if moment is not None:
                    yield f"{which}/{name}", moment
