"""Weights of others under our names: read from a file, checked, and written as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.config import ImportConfig
from distill.weight_import import open_clip
from infra.errors import UserError
from pretrain.backbones import weight_files, weights
from pretrain.backbones.config import OpenClipBackboneConfig
from pretrain.checkpoint import artifact
from pretrain.checkpoint.artifact import CheckpointDescription
from pretrain.data.config import Views
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.official import from_official, require_matching_shapes
from pretrain.objectives.config import ObjectiveConfig


@dataclass(frozen=True)
class ImportedWeights:
    """What a file holds, under our names."""

    model: VisionTransformerConfig
    mean: Sequence[float]
    std: Sequence[float]
    backbone: dict[str, Tensor]
    objectives: dict[str, Tensor]
    configs: list[ObjectiveConfig]
    """Of the objectives whose weights came along."""


def _read_weights(config: ImportConfig) -> ImportedWeights:
    state = _state(config.checkpoint)
    if config.layout == "open_clip":
        return _read_open_clip(config, state)
    read = from_official if config.layout == "official" else from_timm
    return ImportedWeights(config.model, config.mean, config.std, read(state, config.model), {}, [])


def _read_open_clip(config: ImportConfig, state: Mapping[str, Tensor]) -> ImportedWeights:
    if config.name is None:
        raise UserError("layout open_clip needs --name, the model's name there")
    known = open_clip.find_known(config.name)
    how = weight_files.read_preprocessing(OpenClipBackboneConfig(model=config.name, checkpoint=config.checkpoint))
    kind = f"objectives.{known.objective.kind}."
    backbone = open_clip.extract_backbone(state, known.model)
    towers = {kind + name: value for name, value in open_clip.extract_towers(state).items()}
    return ImportedWeights(known.model, how["mean"], how["std"], backbone, towers, [known.objective])


def write_checkpoint(config: ImportConfig, directory: Path) -> Mapping[str, Any]:
    """Write a checkpoint of the given weights into a directory; return its metrics.

    Raises:
        UserError: the weights are of another model than the settings say, or not finite.
    """
    try:
        read = _read_weights(config)
    except UserError as error:
        raise UserError(f"{config.checkpoint}: {error}") from None
    both = {f"{role}.{name}": value for role in ("student", "teacher") for name, value in read.backbone.items()}
    found = {name: value.float().contiguous().clone() for name, value in (both | read.objectives).items()}
    for name, value in found.items():
        if not value.isfinite().all():
            raise UserError(f"{config.checkpoint}: {name} holds values that are not finite; fetch it again")
    sides = {"global_crops": {"size": read.model.image_size}, "num_local_crops": 0}  # that fit any patch
    views = Views.model_validate(sides | {"mean": read.mean, "std": read.std})
    described = CheckpointDescription(
        released="teacher", model=read.model, views=views, seed=0, objectives=read.configs
    )
    artifact.write(found, described, directory)
    parameters = sum(value.numel() for value in read.backbone.values())
    return {"images": 0, "bad_samples": {}, "skipped_steps": 0, "rollbacks": 0, "steps": 0, "parameters": parameters}


def _state(path: str) -> dict[str, Tensor]:
    """The tensors of a file, which may hold them beside other things."""
    content: Any = weights.read_weights(path)
    for name in ("teacher", "model", "state_dict"):
        content = content.get(name, content) if isinstance(content, dict) else {}
    content = content if isinstance(content, dict) else {}
    named = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return {name.removeprefix("module."): value for name, value in named.items()}  # as several ranks save them


def from_timm(state: Mapping[str, Tensor], config: VisionTransformerConfig) -> dict[str, Tensor]:
    """timm's Vision Transformers, of a table of positions, as ours; a classifier is left out.

    Raises:
        UserError: they have parts that ours lacks, or other dimensions.
    """
    if config.pos_embed == "rope":
        raise UserError("timm's rotary models split what official files keep whole; import the official file")
    out = {name: value for name, value in state.items() if not name.startswith(("head.", "fc_norm."))}
    table = out.get("pos_embed")
    if table is not None and table.shape[1] == config.grid**2:  # the class token has no position of its own
        out["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    out.setdefault("mask_token", torch.zeros(1, config.embed_dim))
    require_matching_shapes(out, config)
    return out
