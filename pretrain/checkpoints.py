"""Checkpoint artifacts: weights of a learner that load without DeepSpeed, and what is needed to rebuild it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from infra.artifacts import Artifact, open_artifact
from infra.errors import UserError
from pretrain.config import LAUNCHING, PLACES, PretrainSettings
from pretrain.learner import Learner
from pretrain.models import positions
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.vit import VisionTransformer

WEIGHTS = "learner.safetensors"
DESCRIPTION = "learner.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint artifact, opened."""

    artifact: Artifact
    settings: PretrainSettings
    released: str
    """Prefix of the released backbone's weights: `teacher` or `average`."""

    @classmethod
    def open(cls, url: str) -> Checkpoint:
        artifact = open_artifact(url, "checkpoint")
        description = artifact.read_json(DESCRIPTION)
        return cls(artifact, PretrainSettings.model_validate(description["settings"]), description["released"])

    @property
    def model(self) -> VisionTransformerConfig:
        return self.settings.model

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Weights whose name starts with `prefix`, without it."""
        with safe_open(self.artifact.local_file(WEIGHTS), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (no mapping)
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}

    def backbone(self) -> VisionTransformer:
        """The released backbone, for inference."""
        return inference(self.weights(f"{self.released}."), self.model)

    def untrained(self) -> VisionTransformer:
        """The backbone with the initial weights of its settings and seed."""
        return inference(initial_backbone(self.model, self.settings.schedule.seed).state_dict(), self.model)

    def start(self, learner: Learner) -> None:
        """Load student, teacher and heads into a learner of the same dimensions.

        Learned position tables are resized; objectives that only one of the two has are left alone.

        Raises:
            UserError: the checkpoint is a distillation's, or has other dimensions.
        """
        if self.released != "teacher":
            raise UserError(f"{self.artifact.url}: a distillation's; start from a pretraining checkpoint")
        wanted = learner.state_dict()
        known = {objective.kind for objective in self.settings.objectives} & set(learner.objectives)
        shared = ("student.", "teacher.", *(f"objectives.{kind}." for kind in known))
        state = {name: value for name, value in self.weights().items() if name.startswith(shared)}
        for name, value in wanted.items():
            fixed = name.endswith("decoder.pos_embed") or learner.student.config.position == "sincos"
            if not name.startswith(shared):
                state[name] = value
            elif name.endswith("pos_embed") and name in state and state[name].shape != value.shape:
                state[name] = value if fixed else _resized_table(state[name], value, learner.student.config)
        for name in state.keys() | wanted.keys():
            if name not in state or name not in wanted or state[name].shape != wanted[name].shape:
                raise UserError(f"{self.artifact.url}: {name} does not fit the settings; keep its model and objectives")
        learner.load_state_dict(state)


def inference(weights: Mapping[str, Tensor], model: VisionTransformerConfig) -> VisionTransformer:
    """A backbone of some weights, frozen."""
    backbone = VisionTransformer(model.model_copy(update={"attention": "sdpa", "drop_path": 0.0}))
    backbone.load_state_dict(weights)
    return backbone.requires_grad_(False).eval()


def _resized_table(table: Tensor, wanted: Tensor, model: VisionTransformerConfig) -> Tensor:
    """A position table `[1, 1 + side * side, dim]` for another grid."""
    side, other = (math.isqrt(each.shape[1] - 1) for each in (table, wanted))
    return torch.cat(
        [table[:, :1], positions.resized(table[:, 1:], (side, side), (other, other), model.interpolation)], dim=1
    )


def initial_backbone(model: VisionTransformerConfig, seed: int) -> VisionTransformer:
    """A backbone with the initial weights of a seed."""
    torch.manual_seed(seed)
    return VisionTransformer(model)


def write(weights: Mapping[str, Tensor], released: str, settings: PretrainSettings, directory: Path) -> None:
    """Write weights and description of a learner into an artifact's directory.

    Args:
        weights: its state dict, on the CPU.
        released: `teacher` or `average`: which of its backbones is released.
    """
    save_file(dict(weights), directory / WEIGHTS, metadata={"format": "pt"})
    description: dict[str, Any] = {
        "settings": settings.model_dump(mode="json", exclude={*PLACES, *LAUNCHING}),
        "released": released,
    }
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=1))
