"""Self-supervised distillation from a frozen teacher with its heads (DINOv2, section 5), by pretraining's engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.config import DistillConfig
from infra.artifacts import Artifact, Plan, open_artifact
from infra.errors import UserError
from pretrain.checkpoints import Checkpoint, initial_backbone
from pretrain.config import PretrainSettings, decisive
from pretrain.learner import Learner
from pretrain.objectives.build import build as build_objectives
from pretrain.reporting import Task
from pretrain.train import corpus_inputs, produce_together, train, view_dataset

VERSION = 4
_DISTILLED = ("dino", "ibot", "koleo", "gram")  # the others have nothing to learn from a teacher


def distill(config: DistillConfig) -> Artifact:
    """Train a student on the targets of a frozen teacher; return its checkpoint artifact.

    Raises:
        UserError: teacher or corpus is missing, or student and teacher do not fit.
    """
    teacher = Checkpoint.open(config.teacher_checkpoint)
    settings = student_settings(config, teacher)

    def write(directory: Path) -> Mapping[str, Any]:
        dataset, url = view_dataset(config.corpora, settings), planned.resolve(config.out)
        task = Task("distill", settings, dataset, lambda: build_learner(settings, teacher), directory, url, planned)
        return train(task, task.build())

    planned = plan(config)
    return produce_together(planned, config.out, write)


def plan(config: DistillConfig) -> Plan:
    """The checkpoint that a configuration asks for."""
    teacher = open_artifact(config.teacher_checkpoint, "checkpoint").as_input()
    inputs = {"teacher": teacher} | corpus_inputs(config.corpora)
    return Plan("checkpoint", "distill", VERSION, decisive(config), inputs)


def student_settings(config: DistillConfig, teacher: Checkpoint) -> PretrainSettings:
    """The teacher's objectives and views with the student's model and schedules; stochastic depth is off.

    Raises:
        UserError: the teacher is itself distilled, has no prototypes, or patches of another size.
    """
    if config.model.patch_size != teacher.model.patch_size:
        raise UserError(
            f"model.patch_size: {config.model.patch_size}, but the teacher's is {teacher.model.patch_size}; "
            "patch tokens must match one to one"
        )
    if teacher.released != "teacher":
        raise UserError(
            f"{teacher.artifact.url}: a distillation's, whose heads are its teacher's; distill from that one"
        )
    objectives = [each for each in teacher.settings.objectives if each.kind in _DISTILLED]
    if not any(each.kind in ("dino", "ibot") for each in objectives):
        raise UserError(f"{teacher.artifact.url}: has no prototypes to distill from; train it with dino or ibot")
    return PretrainSettings(
        model=config.model.model_copy(update={"drop_path": 0.0}),
        objectives=objectives,
        views=teacher.settings.views,
        sampling=config.sampling,
        schedule=config.schedule,
        optimizer=config.optimizer,
        teacher=config.average,
        guards=config.guards,
        health=config.health,
        sharding=config.sharding,
        runtime=config.runtime,
        launch=config.launch,
    )


def build_learner(settings: PretrainSettings, teacher: Checkpoint) -> Learner:
    """A new student under the released backbone of a checkpoint and the heads it was trained with."""
    student = initial_backbone(settings.model, settings.schedule.seed)
    torch.manual_seed(settings.schedule.seed + 1)
    losses = build_objectives(settings.objectives, settings.model, teacher.model)
    for name, objective in losses.items():
        for part in ("teacher_head", "targets"):
            if weights := teacher.weights(f"objectives.{name}.{part}."):
                getattr(objective, part).load_state_dict(weights)
    return Learner(student, teacher.backbone(), losses, settings.views, distilling=True)
