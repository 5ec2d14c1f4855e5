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
from pretrain.ranks import world
from pretrain.sharding.base import MOMENTS, Engine

_INDEX = "state.json"
_VALUE = "value"


@dataclass(frozen=True)
class Part:
    """What one rank writes of a state: copies on the CPU."""

    rank: int
    tensors: dict[str, Tensor]
    places: dict[str, int]
    """The rank that writes each tensor of the whole state."""
    optimizer_steps: int


def collect(engine: Engine) -> Part:
    """This rank's part of parameters, buffers and the optimiser's moments; called on all ranks."""
    rank, world_size = world()
    mine: dict[str, Tensor] = {}
    places: dict[str, int] = {}
    filled = [0] * world_size
    for name, tensor in _tensors(engine):
        owner = filled.index(min(filled))
        filled[owner] += tensor.nbytes
        places[name] = owner
        if owner == rank:
            mine[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return Part(rank, mine, places, engine.optimizer_steps)


def write(part: Part, directory: Path) -> list[Path]:
    """Write a part; return its files."""
    paths = [directory / _part(part.rank)]
    save_file(part.tensors, paths[0])
    if part.rank == 0:
        paths.append(directory / _INDEX)
        paths[1].write_text(json.dumps({"optimizer_steps": part.optimizer_steps, "places": part.places}))
    return paths


def load(engine: Engine, directory: Path) -> None:
    """Read what `write` wrote, on any number of ranks.

    Raises:
        UserError: the state is of other modules.
    """
    index = json.loads((directory / _INDEX).read_text())
    places: dict[str, int] = index["places"]
    parameters, buffers = dict(engine.module.named_parameters()), dict(engine.module.named_buffers())
    if {name for name in places if name.startswith(_VALUE)} != {
        f"{_VALUE}/{name}" for name in engine.module.state_dict()
    }:
        raise UserError(f"{directory}: holds the state of another model or objectives; choose another --out")
    moved = [name.split("/", 1)[1] for name in places if name.startswith(f"{MOMENTS[0]}/")]
    engine.expect_moments([parameters[name] for name in moved], index["optimizer_steps"])
    with ExitStack() as stack:
        files = {
            part: stack.enter_context(safe_open(directory / _part(part), framework="pt"))
            for part in set(places.values())
        }
        for full_name, part in places.items():
            kind, name = full_name.split("/", 1)
            value = files[part].get_tensor(full_name)
            if name in buffers:
                buffers[name].copy_(value)
            else:
                engine.fill(parameters[name], value, next((each for each in MOMENTS if each == kind), None))


def weights(engine: Engine, prefix: str = "") -> dict[str, Tensor]:
    """The module's state dict, or of one of its modules, whole, on the first rank; elsewhere it is empty. Called on
    all ranks."""
    found = {}
    for name, tensor in _values(engine, prefix):
        if world()[0] == 0:
            found[name.removeprefix(prefix)] = tensor.detach().cpu().contiguous()
    return found


def _part(rank: int) -> str:
    return f"state-{rank:05d}.safetensors"


def _values(engine: Engine, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """What a state dict holds, in its order; parameters that are used twice come once."""
    parameters = dict(engine.module.named_parameters())
    for name, value in engine.module.state_dict().items():
        if name.startswith(prefix):
            yield name, engine.whole(parameters[name]) if name in parameters else value


def _tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(engine.module.named_parameters())
    for name, value in _values(engine):
        yield f"{_VALUE}/{name}", value
        if name in parameters and parameters[name].requires_grad:
            for which in MOMENTS:
                moment = engine.moment(parameters[name], which)
                if moment is not None:
                    yield f"{which}/{name}", moment
