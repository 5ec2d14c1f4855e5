"""Feature distillation (AM-RADIO, arXiv 2312.06709, section 3.4): for each teacher a head on class and patch tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.objectives.config import FeaturesConfig
from pretrain.data.loader import Batch
from pretrain.models.positions import to_grid
from pretrain.objectives.base import BackboneWidths, Objective, Outputs, TeacherOutputs

_LEAST = 1e-6  # variance of a channel that says nothing


MODULE = "of_"
"""What stands before the names of students and teachers as modules: torch has taken some (half, type, keys)."""


def module_name(name: str) -> str:
    return MODULE + name


class ChannelStatistics(nn.Module):
    """Mean and variance of what a teacher says, channel by channel."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("squares", torch.zeros(dim))

    @torch.no_grad()
    def update(self, tokens: Tensor) -> None:
        """Take tokens `[..., dim]` into account (Chan's parallel update of mean and squared deviations)."""
        rows = tokens.flatten(0, -2).float()
        count = self.count + len(rows)
        moved = rows.mean(0) - self.mean
        self.squares += (rows - rows.mean(0)).square().sum(0) + moved.square() * self.count * len(rows) / count
        self.mean += moved * len(rows) / count
        self.count.copy_(count)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[..., dim]` with mean 0 and variance 1 by channel, float32."""
        return (tokens.float() - self.mean) * (self.squares / self.count).clamp_min(_LEAST).rsqrt()


class TeacherHeads(nn.Module):
    """From the student's tokens to those of one teacher."""

    def __init__(self, student: BackboneWidths, teacher: BackboneWidths, hidden: int) -> None:
        super().__init__()
        self.class_token = _head(student.embed_dim, hidden or teacher.embed_dim, teacher.embed_dim)
        self.patch_tokens = _head(student.patch_dim, hidden or teacher.patch_dim, teacher.patch_dim)


def _head(dim: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out))


class TeacherStatistics(nn.Module):
    """How a teacher's tokens are standardized."""

    def __init__(self, teacher: BackboneWidths) -> None:
        super().__init__()
        self.class_token = ChannelStatistics(teacher.embed_dim)
        self.patch_tokens = ChannelStatistics(teacher.patch_dim)


class FeatureDistill(Objective):
    """Distance of the student's tokens, through a teacher's heads, from the teacher's."""

    def __init__(self, config: FeaturesConfig, student: BackboneWidths, teachers: Mapping[str, BackboneWidths]) -> None:
        super().__init__(config.weight)
        self.config = config
        self.heads = nn.ModuleDict(
            {module_name(name): TeacherHeads(student, teacher, config.hidden_dim) for name, teacher in teachers.items()}
        )
        self.standards = nn.ModuleDict({module_name(name): TeacherStatistics(each) for name, each in teachers.items()})

    def update_statistics(self, taught: TeacherOutputs) -> None:
        """Take what teachers say of a batch into account, before the training begins."""
        for name, standards in self.standards.items():
            for part, standard in standards.named_children():
                assert isinstance(standard, ChannelStatistics)
                standard.update(getattr(taught.features(name.removeprefix(MODULE)), part))

    def share_teacher_state(self, other: FeatureDistill) -> None:
        """Take another student's standards, whose modules stay its own."""
        self._modules.pop("standards", None)
        self.__dict__["standards"] = other.standards

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`features_NAME_class` and `features_NAME_patch` for each teacher."""
        terms, config = {}, self.config
        for module, heads in self.heads.items():
            name = module.removeprefix(MODULE)
            assert isinstance(heads, TeacherHeads)
            wanted = {part: self._wanted(outputs, name, part) for part in ("class_token", "patch_tokens")}
            own = outputs.masked_student_globals
            summary = heads.class_token(own.class_token).float()
            patches = heads.patch_tokens(to_grid(own.patch_tokens, wanted["patch_tokens"].shape[1])).float()
            terms[f"features_{name}_class"] = config.class_weight * cosine_distance(summary, wanted["class_token"])
            terms[f"features_{name}_patch"] = config.patch_weight * (
                config.cosine * cosine_distance(patches, wanted["patch_tokens"])
                + config.smooth_l1 * F.smooth_l1_loss(patches, wanted["patch_tokens"])
            )
        return terms

    def _wanted(self, outputs: Outputs, name: str, part: str) -> Tensor:
        tokens = getattr(outputs.teachers.features(name), part)
        if not self.config.standardize_images:
            return tokens.float()
        return outputs.teachers.cached(
            f"{name} {part}", lambda: self.standards.get_submodule(f"{module_name(name)}.{part}")(tokens)
        )


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean of 1 - cosine over vectors `[..., dim]`."""
    return 1 - F.cosine_similarity(x, y, dim=-1).mean()
