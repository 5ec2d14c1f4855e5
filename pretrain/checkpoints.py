"""Checkpoint artifacts: weights of a learner that load without DeepSpeed, and what is needed to rebuild it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from infra.artifacts import Artifact, open_artifact
from infra.config import Config
from infra.errors import UserError
from pretrain.config import PretrainSettings
from pretrain.data.config import Views
from pretrain.learner import Pretraining, Role
from pretrain.models import positions
from pretrain.models.config import ModelConfig, TimmNetworkConfig, VisionTransformerConfig
from pretrain.models.timm_network import Network, TimmNetwork
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.config import ObjectiveConfig

_TELLING = ("name", "heads", "norm_eps", "activation", "pre_norm", "position", "key_bias", "ffn")
"""Settings of a network that decide what its weights do, and need not show in their shapes."""
WEIGHTS = "learner.safetensors"
DESCRIPTION = "learner.json"
STUDENTS = "students"
"""Metric of a checkpoint of several students: the URLs of their own checkpoints."""


class Description(Config):
    """What is needed to rebuild the modules of a checkpoint."""

    released: Role
    """Prefix of the released backbone's weights: of a distillation `average`."""
    model: ModelConfig
    """The backbone."""
    views: Views
    """How its images were cut and normalised."""
    seed: int
    """Seed of its initial weights."""
    objectives: list[ObjectiveConfig] = Field(default_factory=list)
    """Those whose heads, of student and teacher, are in the checkpoint."""
    temperature: float | None = None
    """The teacher's, in the end."""

    @classmethod
    def of(cls, settings: PretrainSettings) -> Description:
        """That of a pretraining."""
        return cls(
            released="teacher",
            model=settings.model,
            views=settings.views,
            seed=settings.schedule.seed,
            objectives=settings.objectives,
            temperature=settings.teacher.temperature[1],
        )


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint artifact, opened."""

    artifact: Artifact
    description: Description

    @classmethod
    def open(cls, url: str) -> Checkpoint:
        """Open a checkpoint.

        Raises:
            UserError: there is none, it is of several students, or an earlier version wrote it.
        """
        artifact = open_artifact(url, "checkpoint")
        if STUDENTS in artifact.metrics:
            raise UserError(f"{url}: of several students; give one of {', '.join(artifact.metrics[STUDENTS])}")
        try:
            return cls(artifact, Description.model_validate(artifact.read_json(DESCRIPTION)))
        except ValidationError:
            raise UserError(f"{url}: written by another version of fovea; run its stage again") from None

    @property
    def model(self) -> ModelConfig:
        return self.description.model

    @property
    def views(self) -> Views:
        return self.description.views

    def weights(self, prefix: str = "") -> dict[str, Tensor]:
        """Weights whose name starts with `prefix`, without it."""
        with safe_open(self.artifact.local_file(WEIGHTS), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (no mapping)
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}

    def require_network(self, other: ModelConfig) -> None:
        """Check that weights mean in another network what they mean in this one, as far as shapes do not tell.

        Raises:
            UserError: they do not.
        """
        ours, theirs = (each.model_dump() for each in (self.model, other))
        for key in _TELLING:
            if ours.get(key) != theirs.get(key):
                made = f"was made with model.{key} {ours.get(key)}, not {theirs.get(key)}"
                raise UserError(f"{self.artifact.url}: {made}; give it the same")

    def backbone(self) -> Network:
        """The released backbone, for inference."""
        return inference(self.weights(f"{self.description.released}."), self.model)

    def untrained(self) -> Network:
        """The backbone with the initial weights of its settings and seed."""
        return inference(initial_backbone(self.model, self.description.seed).state_dict(), self.model)

    def initial_identity(self) -> dict[str, Any]:
        """What the backbone before its first step is a function of."""
        views = self.views.model_dump(mode="json", include={"mean", "std"})
        return {"model": self.model.model_dump(mode="json"), "seed": self.description.seed, **views}

    def start(self, learner: Pretraining) -> None:
        """Load student, teacher and heads into a learner of the same dimensions.

        Learned position tables are resized; objectives that only one of the two has are left alone.

        Raises:
            UserError: the checkpoint is a distillation's, or has other dimensions.
        """
        self.require_network(learner.student.config)
        if self.description.released != "teacher":
            raise UserError(f"{self.artifact.url}: a distillation's; start from a pretraining checkpoint")
        wanted = learner.state_dict()
        known = {objective.kind for objective in self.description.objectives} & set(learner.objectives)
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


def inference(weights: Mapping[str, Tensor], model: ModelConfig) -> Network:
    """A backbone of some weights, frozen."""
    if isinstance(model, VisionTransformerConfig):
        model = model.model_copy(update={"attention": "sdpa", "drop_path": 0.0})
    backbone = build_backbone(model)
    backbone.load_state_dict(weights)
    return backbone.requires_grad_(False).eval()


def _resized_table(table: Tensor, wanted: Tensor, model: VisionTransformerConfig) -> Tensor:
    """A position table `[1, 1 + side * side, dim]` for another grid."""
    side, other = (math.isqrt(each.shape[1] - 1) for each in (table, wanted))
    return torch.cat(
        [table[:, :1], positions.resized(table[:, 1:], (side, side), (other, other), model.interpolation)], dim=1
    )


def build_backbone(model: ModelConfig) -> Network:
    """A backbone with initial weights by torch's generator as it stands."""
    return TimmNetwork(model) if isinstance(model, TimmNetworkConfig) else VisionTransformer(model)


def initial_backbone(model: ModelConfig, seed: int) -> Network:
    """A backbone with the initial weights of a seed."""
    torch.manual_seed(seed)
    return build_backbone(model)


def write(weights: Mapping[str, Tensor], description: Description, directory: Path) -> None:
    """Write weights and description into an artifact's directory.

    Args:
        weights: `student.`, `teacher.` or `average.`, and `objectives.`, on the CPU.
    """
    save_file(dict(weights), directory / WEIGHTS, metadata={"format": "pt"})
    (directory / DESCRIPTION).write_text(description.model_dump_json(indent=1))
