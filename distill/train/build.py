"""Who teaches whom by which losses: a distillation's configuration made into modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from distill.config import DistillConfig
from distill.objectives.clip_distill import ClipDistill, TextTeacher
from distill.objectives.config import (
    ClipDistillConfig,
    DeitConfig,
    DinoIbotConfig,
    DistillObjective,
    FeaturesConfig,
    GramDistillConfig,
)
from distill.objectives.deit import CLASSIFIER, Deit
from distill.objectives.features import FeatureDistill
from distill.objectives.gram_distill import GramDistill
from distill.train.teacher_cache import TeacherCache
from distill.train.teachers import BackboneTeacher, ClassifierTeacher, ClipTeacher
from distill.train.train_module import DistillModule, StudentModule
from infra.errors import UserError
from pretrain.backbones.config import OpenClipBackboneConfig
from pretrain.checkpoint.artifact import Checkpoint
from pretrain.data.config import Views
from pretrain.models.config import ModelConfig, TimmNetworkConfig, VisionTransformerConfig
from pretrain.models.timm_network import Network, with_image_size
from pretrain.models.vit import VisionTransformer
from pretrain.networks import build_initial_backbone
from pretrain.objectives.base import TEACHER, BackboneWidths, Objective
from pretrain.objectives.build import build_objectives as build_objectives
from pretrain.objectives.config import DinoConfig, IbotConfig, KoleoConfig, ObjectiveConfig
from pretrain.objectives.prototypes import PrototypeObjective

ObjectiveT = TypeVar("ObjectiveT")


@dataclass(frozen=True)
class DistillationSetup:
    """A distillation, resolved: the teacher checkpoint opened, views chosen."""

    config: DistillConfig
    checkpoint: Checkpoint | None
    views: Views
    patch_size: int
    """Of the patch tokens that masks cover."""
    classes: list[str]
    """Of the corpora's labels, where an objective reads them."""

    @classmethod
    def from_config(cls, config: DistillConfig, classes: list[str]) -> DistillationSetup:
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
        if self.find_objective(DinoIbotConfig) is not None:
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

    def find_objective(self, kind: type[ObjectiveT]) -> ObjectiveT | None:
        """The objective of a kind, if it is asked for."""
        return next((each for each in self.config.objectives if isinstance(each, kind)), None)

    @property
    def has_headless_teachers(self) -> bool:
        """Whether teachers without heads take part."""
        return bool(self.config.teachers) or self.find_objective(DeitConfig) is not None

    @property
    def teacher_objectives(self) -> list[ObjectiveConfig]:
        """The teacher's own losses that a student can learn by."""
        prototypes = self.find_objective(DinoIbotConfig)
        if prototypes is None or self.checkpoint is None:
            return []
        kinds = (DinoConfig, IbotConfig, KoleoConfig)  # others have nothing to learn from a teacher's heads
        found = [each for each in self.checkpoint.description.objectives if isinstance(each, kinds)]
        return [each.model_copy(update={"weight": prototypes.weight * each.weight}) for each in found]

    def build_module(self, cache: TeacherCache | None = None) -> DistillModule:
        """Students with initial weights, teachers, and their losses.

        Args:
            kept: what teachers say of all views; then they need not be loaded.
        """
        teacher = self.checkpoint.backbone() if self.checkpoint and cache is None else None
        assert teacher is None or isinstance(teacher, VisionTransformer)
        others = self._build_headless_teachers(needed=cache is None)
        teachers: dict[str, BackboneWidths] = ({TEACHER: teacher} if teacher else {}) | {
            name: each for name, each in others.items() if isinstance(each, BackboneTeacher)
        }
        if cache is not None:
            teachers = {name: width for name, width in cache.teachers.items() if name != CLASSIFIER} | teachers
        students = {name: self._build_student(name, teachers) for name in self.config.students}
        rates = {name: each.lr for name, each in self.config.students.items()}
        prototypes = self.find_objective(DinoIbotConfig)
        everywhere = prototypes is not None and prototypes.patches == "all"
        return DistillModule(students, rates, teacher, others, self.views, cache, everywhere)

    def _build_headless_teachers(self, needed: bool) -> dict[str, BackboneTeacher | ClassifierTeacher]:
        """Teachers without heads; where images need not be shown to them, those that are told captions alone."""
        clip, deit = self.find_objective(ClipDistillConfig), self.find_objective(DeitConfig)
        found: dict[str, BackboneTeacher | ClassifierTeacher] = {}
        for name, config in self.config.teachers.items():
            if clip is not None and clip.teacher == name and isinstance(config, OpenClipBackboneConfig):
                found[name] = ClipTeacher(name, config, clip.text.context)
            elif needed:
                found[name] = BackboneTeacher(name, config)
        if deit is not None and needed:
            found[CLASSIFIER] = ClassifierTeacher(deit, len(self.classes))
        return found

    def network(self, name: str) -> ModelConfig:
        """The backbone of a student, with the side at which it is evaluated and published."""
        network = self.config.students[name].network
        return (
            with_image_size(network, self.views.global_crops.size)
            if isinstance(network, TimmNetworkConfig)
            else network
        )

    def _build_student(self, name: str, teachers: Mapping[str, BackboneWidths]) -> StudentModule:
        seed, start = self.config.schedule.seed, self.config.students[name].init_from
        backbone = build_initial_backbone(self.network(name), seed)
        if start is not None:
            _load_initial_weights(backbone, start)
        torch.manual_seed(seed + 1)
        objectives: dict[str, Objective] = {}
        if self.teacher_objectives:
            objectives |= self._build_teacher_objectives(backbone, teachers[TEACHER])
        for config in self.config.objectives:
            if not isinstance(config, DinoIbotConfig):
                objectives[config.kind] = self._build_objective(config, backbone, teachers)
        return StudentModule(backbone, objectives)

    def _build_teacher_objectives(self, student: Network, teacher: BackboneWidths) -> dict[str, Objective]:
        """The teacher's losses, with its heads in them."""
        assert self.checkpoint is not None
        if student.embed_dim != student.patch_dim and any(
            isinstance(e, IbotConfig) and e.share_head for e in self.teacher_objectives
        ):
            raise UserError("students: the teacher has one head for both kinds of tokens, which this network has not")
        losses = build_objectives(self.teacher_objectives, student, teacher)
        for name, objective in losses.items():
            for part in ("teacher_head", "targets"):
                weights = self.checkpoint.weights(f"objectives.{name}.{part}.")
                if weights and isinstance(objective, PrototypeObjective):
                    getattr(objective, part).load_state_dict(weights)
        return losses

    def _build_objective(
        self, config: DistillObjective, student: Network, teachers: Mapping[str, BackboneWidths]
    ) -> Objective:
        if isinstance(config, FeaturesConfig):
            return FeatureDistill(
                config, student, {name: teachers[name] for name in _select_teachers(config, teachers)}
            )
        if isinstance(config, GramDistillConfig):
            return GramDistill(config, _select_teachers(config, teachers))
        if isinstance(config, DeitConfig):
            return Deit(config, student, len(self.classes))
        assert isinstance(config, ClipDistillConfig)
        teacher: Any = teachers.get(config.teacher)
        if not isinstance(teacher, ClipTeacher):
            raise UserError(f"objectives: clip's teacher {config.teacher!r} is none of kind open_clip in teachers")
        told: TextTeacher = teacher
        return ClipDistill(config, student, told)


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


def _select_teachers(config: FeaturesConfig | GramDistillConfig, teachers: Mapping[str, BackboneWidths]) -> list[str]:
    """Names of the teachers that an objective compares with."""
    unknown = [name for name in config.teachers if name not in teachers]
    if unknown or not teachers:
        named = unknown[0] if unknown else "none"
        raise UserError(f"objectives: {config.kind}: no teacher {named}; there are {', '.join(teachers) or 'none'}")
    return config.teachers or list(teachers)


def _load_initial_weights(backbone: Network, url: str) -> None:
    checkpoint = Checkpoint.open(url)
    checkpoint.require_network(backbone.config)
    try:
        backbone.load_state_dict(checkpoint.weights(f"{checkpoint.description.released}."))
    except RuntimeError:
        raise UserError(f"{url}: holds another backbone than the student's; give the model it was made with") from None
