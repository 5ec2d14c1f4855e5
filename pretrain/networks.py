"""Backbones built from their settings: with initial weights, with given ones, and as the start of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from infra.errors import UserError
from pretrain.checkpoint.artifact import Checkpoint
from pretrain.models import positions
from pretrain.models.config import ModelConfig, TimmNetworkConfig, VisionTransformerConfig
from pretrain.models.timm_network import Network, TimmNetwork
from pretrain.models.vit import VisionTransformer
from pretrain.train_module import PretrainModule


def build_backbone(model: ModelConfig) -> Network:
    """A backbone with initial weights by torch's generator as it stands."""
    return TimmNetwork(model) if isinstance(model, TimmNetworkConfig) else VisionTransformer(model)


def build_initial_backbone(model: ModelConfig, seed: int) -> Network:
    """A backbone with the initial weights of a seed."""
    torch.manual_seed(seed)
    return build_backbone(model)


def build_for_inference(weights: Mapping[str, Tensor], model: ModelConfig) -> Network:
    """A backbone of some weights, frozen."""
    if isinstance(model, VisionTransformerConfig):
        model = model.model_copy(update={"attention": "sdpa", "drop_path_rate": 0.0})
    backbone = build_backbone(model)
    backbone.load_state_dict(weights)
    return backbone.requires_grad_(False).eval()


def init_from_checkpoint(checkpoint: Checkpoint, module: PretrainModule) -> None:
    """Load student, teacher and heads of a checkpoint into a learner of the same dimensions.

    Learned position tables are resized; objectives that only one of the two has are left alone.

    Raises:
        UserError: the checkpoint is a distillation's, or has other dimensions.
    """
    url, model = checkpoint.artifact.url, module.student.config
    checkpoint.require_network(model)
    if checkpoint.description.released != "teacher":
        raise UserError(f"{url}: a distillation's; start from a pretraining checkpoint")
    wanted = module.state_dict()
    known = {objective.kind for objective in checkpoint.description.objectives} & set(module.objectives)
    shared = ("student.", "teacher.", *(f"objectives.{kind}." for kind in known))
    state = {name: value for name, value in checkpoint.weights().items() if name.startswith(shared)}
    for name, value in wanted.items():
        fixed = name.endswith("decoder.pos_embed") or model.pos_embed == "sincos"
        if not name.startswith(shared):
            state[name] = value
        elif name.endswith("pos_embed") and name in state and state[name].shape != value.shape:
            state[name] = value if fixed else _resize_table(state[name], value, model)
    for name in state.keys() | wanted.keys():
        if name not in state or name not in wanted or state[name].shape != wanted[name].shape:
            raise UserError(f"{url}: {name} does not fit the settings; keep its model and objectives")
    module.load_state_dict(state)


def _resize_table(table: Tensor, wanted: Tensor, model: VisionTransformerConfig) -> Tensor:
    """A position table `[1, 1 + side * side, dim]` for another grid."""
    side, other = (math.isqrt(each.shape[1] - 1) for each in (table, wanted))
    return torch.cat(
        [table[:, :1], positions.resample_pos_embed(table[:, 1:], (side, side), (other, other), model.interpolation)],
        dim=1,
    )
