"""Import: weights of official DINOv2 and DINOv3 code, or of timm, to a Fovea checkpoint to start a pretraining from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.config import ImportConfig
from infra.artifacts import Artifact, Input, Plan, produce
from infra.errors import UserError
from infra.hashing import hash_file
from pretrain import checkpoints, weights
from pretrain.checkpoints import Description
from pretrain.data.config import Views
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.official import from_official, require_fitting

VERSION = 2


def import_weights(config: ImportConfig) -> Artifact:
    """Write a checkpoint whose student and teacher are the given weights; heads it has none.

    Raises:
        UserError: the file is missing, or of another model than the settings say.
    """
    path = Path(config.checkpoint)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of weights")
    settings = config.model_dump(mode="json", exclude={"checkpoint", "out"})
    source = {"weights": Input(id=hash_file(path), url=config.checkpoint)}
    plan = Plan("checkpoint", "import", VERSION, settings, source)
    return produce(plan, config.out, lambda directory: _write(config, directory))


def _write(config: ImportConfig, directory: Path) -> Mapping[str, Any]:
    read = from_official if config.layout == "official" else from_timm
    try:
        backbone = read(_state(config.checkpoint), config.model)
    except UserError as error:
        raise UserError(f"{config.checkpoint}: {error}") from None
    backbone = {name: value.float().contiguous() for name, value in backbone.items()}
    both = {f"{role}.{name}": value.clone() for role in ("student", "teacher") for name, value in backbone.items()}
    sides = {"globals": {"size": config.model.image_size}, "local_count": 0}  # that fit any patch
    views = Views.model_validate(sides | {"mean": config.mean, "std": config.std})
    description = Description(released="teacher", model=config.model, views=views, seed=0)
    checkpoints.write(both, description, directory)
    parameters = sum(value.numel() for value in backbone.values())
    return {"images": 0, "unusable": {}, "skipped": 0, "rewinds": 0, "steps": 0, "parameters": parameters}


def _state(path: str) -> dict[str, Tensor]:
    """The tensors of a file, which may hold them beside other things."""
    content: Any = weights.read(path)
    for name in ("teacher", "model", "state_dict"):
        content = content.get(name, content) if isinstance(content, dict) else {}
    content = content if isinstance(content, dict) else {}
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def from_timm(state: Mapping[str, Tensor], config: VisionTransformerConfig) -> dict[str, Tensor]:
    """timm's Vision Transformers, of a table of positions, as ours; a classifier is left out.

    Raises:
        UserError: they have parts that ours lacks, or other dimensions.
    """
    if config.position == "rope":
        raise UserError("timm's rotary models split what official files keep whole; import the official file")
    out = {name: value for name, value in state.items() if not name.startswith(("head.", "fc_norm."))}
    table = out.get("pos_embed")
    if table is not None and table.shape[1] == config.grid**2:  # the class token has no position of its own
        out["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    out.setdefault("mask_token", torch.zeros(1, config.dim))
    require_fitting(out, config)
    return out
