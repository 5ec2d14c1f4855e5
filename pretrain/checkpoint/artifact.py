"""Checkpoint artifacts: weights of a learner that load without DeepSpeed, and what is needed to rebuild it.

Torch is imported by what reads or writes weights alone: artifacts are found and checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from infra.artifacts.artifact import Artifact, open_artifact
from infra.config import Config
from infra.errors import UserError
from pretrain.config import PretrainSettings
from pretrain.data.config import Views
from pretrain.models.config import ModelConfig
from pretrain.objectives.config import ObjectiveConfig

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.models.timm_network import Network

_SETTINGS_NOT_IN_SHAPES = (
    "name",
    "num_heads",
    "norm_eps",
    "activation",
    "pre_norm",
    "pos_embed",
    "key_bias",
    "ffn_layer",
)
"""Settings of a network that decide what its weights do, and need not show in their shapes."""
WEIGHTS = "weights.safetensors"
DESCRIPTION = "checkpoint.json"
STUDENTS = "students"
"""Metric of a checkpoint of several students: the URLs of their own checkpoints."""
Role = Literal["teacher", "average"]


class CheckpointDescription(Config):
    """What is needed to rebuild the modules of a checkpoint."""

    released: Role
    """Prefix of the released backbone's weights: of a distillation `average`."""
    model: ModelConfig
    """The backbone."""
    views: Views
    """How its images were cut and normalized."""
    seed: int
    """Seed of its initial weights."""
    objectives: list[ObjectiveConfig] = Field(default_factory=list)
    """Those whose heads, of student and teacher, are in the checkpoint."""
    temperature: float | None = None
    """The teacher's, in the end."""

    @classmethod
    def from_config(cls, settings: PretrainSettings) -> CheckpointDescription:
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
    description: CheckpointDescription

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
            return cls(artifact, CheckpointDescription.model_validate(artifact.read_json(DESCRIPTION)))
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
        from safetensors import safe_open

        with safe_open(self.artifact.local_file(WEIGHTS), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (no mapping)
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}

    def require_network(self, other: ModelConfig) -> None:
        """Check that weights mean in another network what they mean in this one, as far as shapes do not tell.

        Raises:
            UserError: they do not.
        """
        ours, theirs = (each.model_dump() for each in (self.model, other))
        for key in _SETTINGS_NOT_IN_SHAPES:
            if ours.get(key) != theirs.get(key):
                made = f"was made with model.{key} {ours.get(key)}, not {theirs.get(key)}"
                raise UserError(f"{self.artifact.url}: {made}; give it the same")

    def backbone(self) -> Network:
        """The released backbone, for inference."""
        from pretrain.networks import build_for_inference

        return build_for_inference(self.weights(f"{self.description.released}."), self.model)

    def untrained_backbone(self) -> Network:
        """The backbone with the initial weights of its settings and seed."""
        from pretrain.networks import build_for_inference, build_initial_backbone

        return build_for_inference(build_initial_backbone(self.model, self.description.seed).state_dict(), self.model)

    def initial_identity(self) -> dict[str, Any]:
        """What the backbone before its first step is a function of."""
        views = self.views.model_dump(mode="json", include={"mean", "std"})
        return {"model": self.model.model_dump(mode="json"), "seed": self.description.seed, **views}


def write(weights: Mapping[str, Tensor], description: CheckpointDescription, directory: Path) -> None:
    """Write weights and description into an artifact's directory.

    Args:
        weights: `student.`, `teacher.` or `average.`, and `objectives.`, on the CPU.
    """
    from safetensors.torch import save_file

    save_file(dict(weights), directory / WEIGHTS, metadata={"format": "pt"})
    (directory / DESCRIPTION).write_text(description.model_dump_json(indent=1))
