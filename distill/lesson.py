"""Who teaches whom by which losses: a distillation's configuration made into modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distill.config import DistillConfig
from distill.learner import Distillation, Student
from distill.objectives.clip import ClipLogits, TextTeacher
from distill.objectives.config import (
    ClipLogitsConfig,
    DeitConfig,
    DistillObjective,
    FeaturesConfig,
    PrototypesConfig,
    RelationsConfig,
)
from distill.objectives.deit import CLASSIFIER, Deit
from distill.objectives.features import Features
from distill.objectives.relations import Relations
from distill.taught import Kept
from distill.teachers import BackboneTeacher, ClassifierTeacher, ClipTeacher
from infra.errors import UserError
from pretrain.checkpoints import Checkpoint
from pretrain.config import OpenClipBackbone
from pretrain.data.config import Views
from pretrain.models.config import ModelConfig, TimmNetworkConfig, VisionTransformerConfig
from pretrain.models.timm_network import Network, sized
from pretrain.models.vit import VisionTransformer
from pretrain.networks import initial_backbone
from pretrain.objectives.base import TEACHER, Objective, Wide
from pretrain.objectives.build import build as build_objectives
from pretrain.objectives.config import DinoConfig, IbotConfig, KoleoConfig, ObjectiveConfig
from pretrain.objectives.prototypes import PrototypeObjective


@dataclass(frozen=True)
class Lesson:
    """A distillation, resolved: the teacher checkpoint opened, views chosen."""

    config: DistillConfig
    checkpoint: Checkpoint | None
    views: Views
    patch_size: int
    """Of the patch tokens that masks cover."""
    classes: list[str]
    """Of the corpora's labels, where an objective reads them."""

    @classmethod
    def of(cls, config: DistillConfig, classes: list[str]) -> Lesson:
        """Resolve a configuration.

        Raises:
            UserError: teacher and students do not fit.
        """
        checkpoint = Checkpoint.open(config.teacher_checkpoint) if config.teacher_checkpoint else None
        views = config.views or (checkpoint.views if checkpoint else Views())
        patch_size = _patch_size(config, checkpoint)
        lesson = cls(config, checkpoint, views, patch_size, classes)
        lesson._require_fitting()
        return lesson

    def _require_fitting(self) -> None:
        if self.asked(PrototypesConfig) is not None:
            if self.checkpoint is None:
                raise UserError("teacher_checkpoint: objective prototypes needs a teacher with heads; give its URL")
            _require_heads(self.checkpoint)
            if self.views.num_global_crops < 2:
                raise UserError("views.num_global_crops: prototypes are compared between two global crops; set 2")
        models = {f"students.{name}.model": student.network for name, student in self.config.students.items()}
        sides = {name: each.patch_size for name, each in models.items() if isinstance(each, VisionTransformerConfig)}
        if self.checkpoint is not None:
            sides["teacher"] = self.patch_size
        for name, patch in sides.items():
            for key, size in self.views.sizes().items():
                if size % patch:
                    raise UserError(f"{key}: {size} is no multiple of the patch size {patch} of {name}")

    def asked(self, kind: type[Any]) -> Any:
        """The objective of a kind, if it is asked for."""
        return next((each for each in self.config.objectives if isinstance(each, kind)), None)

    @property
    def headless(self) -> bool:
        """Whether teachers without heads take part."""
        return bool(self.config.teachers) or self.asked(DeitConfig) is not None

    @property
    def inherited(self) -> list[ObjectiveConfig]:
        """The teacher's own losses that a student can learn by."""
        prototypes = self.asked(PrototypesConfig)
        if prototypes is None or self.checkpoint is None:
            return []
        kinds = (DinoConfig, IbotConfig, KoleoConfig)  # others have nothing to learn from a teacher's heads
        found = [each for each in self.checkpoint.description.objectives if isinstance(each, kinds)]
        return [each.model_copy(update={"weight": prototypes.weight * each.weight}) for each in found]

    def build(self, kept: Kept | None = None) -> Distillation:
        """Students with initial weights, teachers, and their losses.

        Args:
            kept: what teachers say of all views; then they need not be loaded.
        """
        teacher = self.checkpoint.backbone() if self.checkpoint and kept is None else None
        assert teacher is None or isinstance(teacher, VisionTransformer)
        others = self._others(needed=kept is None)
        teachers: dict[str, Wide] = ({TEACHER: teacher} if teacher else {}) | {
            name: each for name, each in others.items() if isinstance(each, BackboneTeacher)
        }
        if kept is not None:
            teachers = {name: width for name, width in kept.teachers.items() if name != CLASSIFIER} | teachers
        students = {name: self._student(name, teachers) for name in self.config.students}
        rates = {name: each.lr for name, each in self.config.students.items()}
        prototypes = self.asked(PrototypesConfig)
        everywhere = prototypes is not None and prototypes.patches == "all"
        return Distillation(students, rates, teacher, others, self.views, kept, everywhere)

    def _others(self, needed: bool) -> dict[str, BackboneTeacher | ClassifierTeacher]:
        """Teachers without heads; where images need not be shown to them, those that are told captions alone."""
        clip, deit = self.asked(ClipLogitsConfig), self.asked(DeitConfig)
        found: dict[str, BackboneTeacher | ClassifierTeacher] = {}
        for name, config in self.config.teachers.items():
            if clip is not None and clip.teacher == name and isinstance(config, OpenClipBackbone):
                found[name] = ClipTeacher(name, config, clip.text.context)
            elif needed:
                found[name] = BackboneTeacher(name, config)
        if deit is not None and needed:
            found[CLASSIFIER] = ClassifierTeacher(deit, len(self.classes))
        return found

    def network(self, name: str) -> ModelConfig:
        """The backbone of a student, with the side at which it is evaluated and published."""
        network = self.config.students[name].network
        return sized(network, self.views.global_crops.size) if isinstance(network, TimmNetworkConfig) else network

    def _student(self, name: str, teachers: Mapping[str, Wide]) -> Student:
        seed, start = self.config.schedule.seed, self.config.students[name].init_from
        backbone = initial_backbone(self.network(name), seed)
        if start is not None:
            _begin(backbone, start)
        torch.manual_seed(seed + 1)
        objectives: dict[str, Objective] = {}
        if self.inherited:
            objectives |= self._with_heads(backbone, teachers[TEACHER])
        for config in self.config.objectives:
            if not isinstance(config, PrototypesConfig):
                objectives[config.kind] = self._objective(config, backbone, teachers)
        return Student(backbone, objectives)

    def _with_heads(self, student: Network, teacher: Wide) -> dict[str, Objective]:
        """The teacher's losses, with its heads in them."""
        assert self.checkpoint is not None
        if student.embed_dim != student.patch_dim and any(
            isinstance(e, IbotConfig) and e.share_head for e in self.inherited
        ):
            raise UserError("students: the teacher has one head for both kinds of tokens, which this network has not")
        losses = build_objectives(self.inherited, student, teacher)
        for name, objective in losses.items():
            for part in ("teacher_head", "targets"):
                weights = self.checkpoint.weights(f"objectives.{name}.{part}.")
                if weights and isinstance(objective, PrototypeObjective):
                    getattr(objective, part).load_state_dict(weights)
        return losses

    def _objective(self, config: DistillObjective, student: Network, teachers: Mapping[str, Wide]) -> Objective:
        if isinstance(config, FeaturesConfig):
            return Features(config, student, {name: teachers[name] for name in _chosen(config, teachers)})
        if isinstance(config, RelationsConfig):
            return Relations(config, _chosen(config, teachers))
        if isinstance(config, DeitConfig):
            return Deit(config, student, len(self.classes))
        assert isinstance(config, ClipLogitsConfig)
        teacher: Any = teachers.get(config.teacher)
        if not isinstance(teacher, ClipTeacher):
            raise UserError(f"objectives: clip's teacher {config.teacher!r} is none of kind open_clip in teachers")
        told: TextTeacher = teacher
        return ClipLogits(config, student, told)


def _patch_size(config: DistillConfig, checkpoint: Checkpoint | None) -> int:
    """Of the teacher that has heads; without one nothing is masked, and any will do that fits."""
    if checkpoint is None:
        return 1
    if not isinstance(checkpoint.model, VisionTransformerConfig):
        raise UserError(f"{checkpoint.artifact.url}: not of a Vision Transformer; give it as one of teachers")
    return checkpoint.model.patch_size


def _require_heads(checkpoint: Checkpoint) -> None:
    url, description = checkpoint.artifact.url, checkpoint.description
    if description.released != "teacher":
        raise UserError(
            f"{url}: a distillation's, which has no heads; distill from its teacher, or by objective features"
        )
    if not any(isinstance(each, DinoConfig | IbotConfig) for each in description.objectives):
        raise UserError(f"{url}: has no prototypes to distill from; train it with dino or ibot, or use features")


def _chosen(config: FeaturesConfig | RelationsConfig, teachers: Mapping[str, Wide]) -> list[str]:
    """Names of the teachers that an objective compares with."""
    unknown = [name for name in config.teachers if name not in teachers]
    if unknown or not teachers:
        named = unknown[0] if unknown else "none"
        raise UserError(f"objectives: {config.kind}: no teacher {named}; there are {', '.join(teachers) or 'none'}")
    return config.teachers or list(teachers)


def _begin(backbone: Network, url: str) -> None:
    checkpoint = Checkpoint.open(url)
    checkpoint.require_network(backbone.config)
    try:
        backbone.load_state_dict(checkpoint.weights(f"{checkpoint.description.released}."))
    except RuntimeError:
        raise UserError(f"{url}: holds another backbone than the student's; give the model it was made with") from None
