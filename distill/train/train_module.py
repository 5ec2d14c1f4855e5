"""Students under frozen teachers: what the engine trains in a distillation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.objectives.clip_distill import ClipDistill
from distill.objectives.features import MODULE, FeatureDistill, module_name
from distill.train.teacher_cache import TeacherCache
from pretrain.data.config import Views
from pretrain.data.loader import Batch
from pretrain.distributed import all_reduce_mean
from pretrain.models.timm_network import Network
from pretrain.models.vit import Features as Said
from pretrain.models.vit import VisionTransformer
from pretrain.monitoring.collapse import PREFIX, RANK
from pretrain.monitoring.collapse_metrics import rankme
from pretrain.objectives.base import TEACHER, Objective, Outputs, TeacherOutputs
from pretrain.objectives.dino import Dino
from pretrain.objectives.prototypes import PrototypeObjective
from pretrain.train_module import StudentBranch, TrainModule, adjust_colors, sum_terms

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Teach = Callable[[Tensor], Said]
"""Crops `[n, 3, S, S]`, values 0 to 1, to a frozen teacher's features."""


class StudentModule(nn.Module):
    """A student, its moving average, which is released, and its losses by name."""

    def __init__(self, student: Network, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.student = student
        self.average = _freeze_copy(student)
        self.objectives = nn.ModuleDict(objectives)
        clip = objectives.get("clip_distill")
        self.average_towers = _freeze_copy(clip.towers) if isinstance(clip, ClipDistill) else None

    def ema_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(source, average): the backbone, and CLIP's towers where it has them."""
        yield self.student, self.average
        if self.average_towers is not None:
            clip = self.objectives["clip_distill"]
            assert isinstance(clip, ClipDistill)
            yield clip.towers, self.average_towers


def _freeze_copy(module: ModuleT) -> ModuleT:
    return copy.deepcopy(module).requires_grad_(False).eval()


_KEPT = {"average.": "average.", "average_towers.": "objectives.clip."}


class DistillModule(TrainModule):
    """Runs teachers once a batch and each student once, which sees everything (DINOv2, section 5).

    Args:
        students: by name.
        rates: factors of their learning rates.
        teacher: the frozen backbone whose heads give targets, where there is one.
        others: teachers without heads, by name; no part of the learner's state.
        views: how crops are normalized.
        kept: what teachers say of views that come again; then none of them is asked.
        all_patches: patch tokens are compared everywhere, not where masks would hide them.
    """

    def __init__(
        self,
        students: Mapping[str, StudentModule],
        rates: Mapping[str, float],
        teacher: VisionTransformer | None,
        others: Mapping[str, Teach],
        views: Views,
        cache: TeacherCache | None = None,
        all_patches: bool = False,
    ) -> None:
        super().__init__(views)
        self.students = nn.ModuleDict({module_name(name): each for name, each in students.items()})
        self.rates = dict(rates)
        self.teacher = teacher
        self.__dict__["others"] = dict(others)
        self.cache = cache
        self.all_patches = all_patches
        self._share_teaching()
        self.train()

    def _share_teaching(self) -> None:
        """What is computed of the teachers alone is the first student's, and the same for all."""
        first, *rest = self._students().values()
        for student in rest:
            for name, objective in student.objectives.items():
                if isinstance(objective, PrototypeObjective | FeatureDistill):
                    objective.share_teacher_state(first.objectives[name])  # type: ignore[arg-type]

    def _students(self) -> dict[str, StudentModule]:
        return {name.removeprefix(MODULE): each for name, each in self.students.items()}  # type: ignore[misc]

    def train(self, mode: bool = True) -> DistillModule:
        super().train(mode)
        for module in (self.teacher, *(average for _, average in self.ema_pairs())):
            if module is not None:
                module.eval()
        return self

    def branches(self) -> list[StudentBranch]:
        return [
            StudentBranch(
                f"students.{module_name(name)}.", student.student, "average", self.rates.get(name, 1.0), _KEPT
            )
            for name, student in self._students().items()
        ]

    def losses(self, batch: Batch, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Terms are named after their student too, where there are several."""
        batch = _mask_everywhere(batch) if self.all_patches else batch
        images, teachers = self._teacher_outputs(batch)
        local = self.normalize(batch.local_crops, batch.local_photometric) if self._reads_locals(batch) else None
        total, named = images.new_zeros(()), dict[str, Tensor]()
        for part, (name, student) in zip(self.branches(), self._students().items(), strict=True):
            outputs = Outputs(student.student, teachers, images, local, None, None, self.collect_metrics)
            loss, terms = sum_terms(self.objectives_of(part), outputs, batch, temperature)
            if self.collect_metrics:
                terms |= outputs.metrics | {RANK: rankme(outputs.masked_student_globals.class_token)}
            total = total + loss
            named |= (
                terms if len(self.students) == 1 else {_name_term(term, name): value for term, value in terms.items()}
            )
            if self.training:
                _average_batch_statistics(student.student)
        return total, named

    @torch.no_grad()
    def _teacher_outputs(self, batch: Batch) -> tuple[Tensor, TeacherOutputs]:
        """The global crops as students take them, and what all teachers will say of them."""
        crops = adjust_colors(batch.global_crops, batch.global_photometric)
        images = (crops - self.mean) / self.std
        if self.cache is not None:
            cache, device = self.cache, images.device
            return images, TeacherOutputs(
                {name: partial(cache.features, name, batch.keys, device) for name in cache.teachers}
            )
        teachers: dict[str, Callable[[], Said]] = {
            name: partial(teach, crops) for name, teach in self.__dict__["others"].items()
        }
        if self.teacher is not None:
            teacher = self.teacher
            teachers[TEACHER] = lambda: teacher([images])[0]
        return images, TeacherOutputs(teachers)

    @torch.no_grad()
    def teacher_features(self, batch: Batch) -> dict[str, Said]:
        """What every teacher says of the global crops of a batch, by name."""
        _, teachers = self._teacher_outputs(batch.to(self.mean.device))
        names = [*([TEACHER] if self.teacher is not None else []), *self.__dict__["others"]]
        return {name: teachers.features(name) for name in names}

    def _reads_locals(self, batch: Batch) -> bool:
        return len(batch.local_crops) > 0 and any(isinstance(each, Dino) for each in self.modules())

    def fit_standardization(self, batches: Iterable[Batch]) -> None:
        """Learn from some batches how large the features of teachers are."""
        (first, *_), device = self.branches(), self.mean.device
        for batch in batches:
            _, teachers = self._teacher_outputs(batch.to(device))
            for objective in self.objectives_of(first):
                if isinstance(objective, FeatureDistill):
                    objective.update_statistics(teachers)

    def begin_step(self, step: int) -> list[tuple[nn.Module, nn.Module]]:
        pairs = (
            objective.begin_step(step, self.teacher)
            for part in self.branches()
            for objective in self.objectives_of(part)
        )
        return [pair for each in pairs for pair in each]

    def ema_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        for student in self._students().values():
            yield from student.ema_pairs()


def _mask_everywhere(batch: Batch) -> Batch:
    masks = torch.ones_like(batch.masks)
    return replace(batch, masks=masks, mask_indices=torch.arange(masks.numel(), device=masks.device))


def _name_term(term: str, student: str) -> str:
    """A term of one of several students; health's keep their beginning, by which they are known."""
    if term.startswith(PREFIX):
        return f"{PREFIX}{student}_{term.removeprefix(PREFIX)}"
    return f"{student}_{term}"


@torch.no_grad()
def _average_batch_statistics(network: nn.Module) -> None:
    """Have batch normalization keep the same statistics on all ranks: each saw other images."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            all_reduce_mean(module.running_mean)
            if module.running_var is not None:
                all_reduce_mean(module.running_var)
