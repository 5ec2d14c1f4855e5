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

from distill.objectives.clip import ClipLogits
from distill.objectives.features import MODULE, Features, module_name
from distill.taught import Kept
from pretrain.collapse import rankme
from pretrain.data.config import Views
from pretrain.data.loader import Batch
from pretrain.health import PREFIX, RANK
from pretrain.learner import Learner, Part, recoloured, weighted
from pretrain.models.timm_network import Network
from pretrain.models.vit import Features as Said
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.base import TEACHER, Objective, Outputs, Taught
from pretrain.objectives.dino import Dino
from pretrain.objectives.prototypes import PrototypeObjective
from pretrain.ranks import all_reduce_mean

Copied = TypeVar("Copied", bound=nn.Module)
Teach = Callable[[Tensor], Said]
"""Crops `[n, 3, S, S]`, values 0 to 1, to a frozen teacher's features."""


class Student(nn.Module):
    """A student, its moving average, which is released, and its losses by name."""

    def __init__(self, student: Network, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.student = student
        self.average = _frozen(student)
        self.objectives = nn.ModuleDict(objectives)
        clip = objectives.get("clip")
        self.average_towers = _frozen(clip.towers) if isinstance(clip, ClipLogits) else None

    def averages(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(source, average): the backbone, and CLIP's towers where it has them."""
        yield self.student, self.average
        if self.average_towers is not None:
            clip = self.objectives["clip"]
            assert isinstance(clip, ClipLogits)
            yield clip.towers, self.average_towers


def _frozen(module: Copied) -> Copied:
    return copy.deepcopy(module).requires_grad_(False).eval()


_KEPT = {"average.": "average.", "average_towers.": "objectives.clip."}


class Distillation(Learner):
    """Runs teachers once a batch and each student once, which sees everything (DINOv2, section 5).

    Args:
        students: by name.
        rates: factors of their learning rates.
        teacher: the frozen backbone whose heads give targets, where there is one.
        others: teachers without heads, by name; no part of the learner's state.
        views: how crops are normalised.
        kept: what teachers say of views that come again; then none of them is asked.
        all_patches: patch tokens are compared everywhere, not where masks would hide them.
    """

    def __init__(
        self,
        students: Mapping[str, Student],
        rates: Mapping[str, float],
        teacher: VisionTransformer | None,
        others: Mapping[str, Teach],
        views: Views,
        kept: Kept | None = None,
        all_patches: bool = False,
    ) -> None:
        super().__init__(views)
        self.students = nn.ModuleDict({module_name(name): each for name, each in students.items()})
        self.rates = dict(rates)
        self.teacher = teacher
        self.__dict__["others"] = dict(others)
        self.kept = kept
        self.all_patches = all_patches
        self._share_teaching()
        self.train()

    def _share_teaching(self) -> None:
        """What is computed of the teachers alone is the first student's, and the same for all."""
        first, *rest = self._students().values()
        for student in rest:
            for name, objective in student.objectives.items():
                if isinstance(objective, PrototypeObjective | Features):
                    objective.learn_from(first.objectives[name])  # type: ignore[arg-type]

    def _students(self) -> dict[str, Student]:
        return {name.removeprefix(MODULE): each for name, each in self.students.items()}  # type: ignore[misc]

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        for module in (self.teacher, *(average for _, average in self.averages())):
            if module is not None:
                module.eval()
        return self

    def parts(self) -> list[Part]:
        return [
            Part(f"students.{module_name(name)}.", student.student, "average", self.rates.get(name, 1.0), _KEPT)
            for name, student in self._students().items()
        ]

    def losses(self, batch: Batch, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Terms are named after their student too, where there are several."""
        batch = _everywhere(batch) if self.all_patches else batch
        images, taught = self._taught(batch)
        local = self.images(batch.local_crops, batch.local_photometric) if self._reads_locals(batch) else None
        total, named = images.new_zeros(()), dict[str, Tensor]()
        for part, (name, student) in zip(self.parts(), self._students().items(), strict=True):
            outputs = Outputs(student.student, taught, images, local, None, None, self.looking)
            loss, terms = weighted(self.objectives_of(part), outputs, batch, temperature)
            if self.looking:
                terms |= outputs.health | {RANK: rankme(outputs.student_globals.class_token)}
            total = total + loss
            named |= terms if len(self.students) == 1 else {_named(term, name): value for term, value in terms.items()}
            if self.training:
                _agree(student.student)
        return total, named

    @torch.no_grad()
    def _taught(self, batch: Batch) -> tuple[Tensor, Taught]:
        """The global crops as students take them, and what all teachers will say of them."""
        crops = recoloured(batch.global_crops, batch.global_photometric)
        images = (crops - self.mean) / self.std
        if self.kept is not None:
            kept, device = self.kept, images.device
            return images, Taught({name: partial(kept.features, name, batch.keys, device) for name in kept.teachers})
        teachers: dict[str, Callable[[], Said]] = {
            name: partial(teach, crops) for name, teach in self.__dict__["others"].items()
        }
        if self.teacher is not None:
            teacher = self.teacher
            teachers[TEACHER] = lambda: teacher([images])[0]
        return images, Taught(teachers)

    @torch.no_grad()
    def teach(self, batch: Batch) -> dict[str, Said]:
        """What every teacher says of the global crops of a batch, by name."""
        _, taught = self._taught(batch.to(self.mean.device))
        names = [*([TEACHER] if self.teacher is not None else []), *self.__dict__["others"]]
        return {name: taught.of(name) for name in names}

    def _reads_locals(self, batch: Batch) -> bool:
        return len(batch.local_crops) > 0 and any(isinstance(each, Dino) for each in self.modules())

    def standardise(self, batches: Iterable[Batch]) -> None:
        """Learn from some batches how large the features of teachers are."""
        (first, *_), device = self.parts(), self.mean.device
        for batch in batches:
            _, taught = self._taught(batch.to(device))
            for objective in self.objectives_of(first):
                if isinstance(objective, Features):
                    objective.see(taught)

    def begin_step(self, step: int) -> list[tuple[nn.Module, nn.Module]]:
        pairs = (
            objective.begin_step(step, self.teacher) for part in self.parts() for objective in self.objectives_of(part)
        )
        return [pair for each in pairs for pair in each]

    def averages(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        for student in self._students().values():
            yield from student.averages()


def _everywhere(batch: Batch) -> Batch:
    masks = torch.ones_like(batch.masks)
    return replace(batch, masks=masks, masked=torch.arange(masks.numel(), device=masks.device))


def _named(term: str, student: str) -> str:
    """A term of one of several students; health's keep their beginning, by which they are known."""
    if term.startswith(PREFIX):
        return f"{PREFIX}{student}_{term.removeprefix(PREFIX)}"
    return f"{student}_{term}"


@torch.no_grad()
def _agree(network: nn.Module) -> None:
    """Have batch normalisation keep the same statistics on all ranks: each saw other images."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            all_reduce_mean(module.running_mean)
            if module.running_var is not None:
                all_reduce_mean(module.running_var)
