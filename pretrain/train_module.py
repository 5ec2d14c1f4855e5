"""What the engine trains, whatever it is made of; and the one of pretraining: a student, a teacher that follows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pretrain.checkpoint.artifact import Role
from pretrain.config import Precision
from pretrain.data import color_gpu
from pretrain.data.config import Views
from pretrain.data.loader import Batch
from pretrain.models.execution import Execution
from pretrain.models.timm_network import Network
from pretrain.models.vit import VisionTransformer
from pretrain.monitoring.collapse import RANK
from pretrain.monitoring.collapse_metrics import rankme
from pretrain.objectives.base import TEACHER, Objective, Outputs, TeacherOutputs


@dataclass(frozen=True)
class StudentBranch:
    """A student of a learner, and what becomes of it."""

    prefix: str
    """What the names of its weights begin with in the learner."""
    student: Network
    """Its name after the prefix is `student`."""
    released: Role
    """Name, after the prefix, of the backbone that is evaluated and published: the student's moving average."""
    lr: float = 1.0
    """Factor of its learning rate."""
    saved_prefixes: Mapping[str, str] = field(
        default_factory=lambda: {"teacher.": "teacher.", "objectives.": "objectives."}
    )
    """What of it is evaluated: beginnings of names after the prefix, and what they become in a checkpoint."""


class TrainModule(nn.Module):
    """Turns a batch into a loss.

    Args:
        views: how crops are normalized.

    Attributes:
        precision: of matrix products.
        looking: whether the next passes tell how healthy the features are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, views: Views) -> None:
        super().__init__()
        self.precision: Precision = "fp32"
        self.collect_metrics = False
        self.register_buffer("mean", torch.tensor(views.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(views.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, batch: Batch, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to optimize and its named terms, unweighted and detached; with `collect_metrics` also collapse."""
        # Here, not around the engine: DeepSpeed's forward switches an outer autocast off.
        with torch.autocast(batch.global_crops.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.losses(batch, temperature)

    def losses(self, batch: Batch, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        """What `forward` returns, computed in the right precision."""
        raise NotImplementedError

    def branches(self) -> list[StudentBranch]:
        """The students, each with weights of its own."""
        raise NotImplementedError

    def objectives_of(self, branch: StudentBranch) -> Iterator[Objective]:
        """The losses of a student, whose name after its prefix is `objectives`."""
        found = self.get_submodule(f"{branch.prefix}objectives")
        assert isinstance(found, nn.ModuleDict)
        for objective in found.values():
            assert isinstance(objective, Objective)
            yield objective

    def begin_step(self, step: int) -> list[tuple[nn.Module, nn.Module]]:
        """Tell the objectives which optimizer step comes next; return (source, copy) modules to be copied before it."""
        raise NotImplementedError

    def ema_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(source, average) modules: what is averaged, and where its moving average is kept."""
        raise NotImplementedError

    def set_execution(self, execution: Execution) -> None:
        """Say what training spares in memory or compiles."""
        for part in self.branches():
            part.student.execution = execution

    def normalize(self, crops: Tensor, photometric_values: Tensor | None = None) -> Tensor:
        """Crops as the network takes them, recolored here where the loader has not done it."""
        return (adjust_colors(crops, photometric_values) - self.mean) / self.std


def adjust_colors(crops: Tensor, photometric_values: Tensor | None = None) -> Tensor:
    """Crops, uint8 `[n, 3, H, W]`, as numbers 0 to 1, recolored where the loader has not done it."""
    images = crops.float() / 255
    if photometric_values is not None and len(photometric_values):
        images = color_gpu.apply(images, photometric_values)
    return images


def sum_terms(
    objectives: Iterator[Objective], outputs: Outputs, batch: Batch, temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms of some objectives, and the terms."""
    total = outputs.images.new_zeros(())
    terms: dict[str, Tensor] = {}
    for objective in objectives:
        for name, term in objective(outputs, batch, temperature).items():
            total = total + objective.weight * term
            terms[name] = term.detach()
    return total, terms


class PretrainModule(TrainModule):
    """Runs student and teacher once a batch and hands their outputs to every objective.

    Args:
        student: the backbone that is optimized.
        teacher: its moving average, which gives targets and is released; never optimized.
        objectives: losses by name, with their heads.
    """

    def __init__(
        self, student: VisionTransformer, teacher: VisionTransformer, objectives: Mapping[str, Objective], views: Views
    ) -> None:
        super().__init__(views)
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.objectives = nn.ModuleDict(objectives)

    def train(self, mode: bool = True) -> PretrainModule:
        super().train(mode)
        self.teacher.eval()
        return self

    def branches(self) -> list[StudentBranch]:
        return [StudentBranch("", self.student, "teacher")]

    def _objectives(self) -> Iterator[Objective]:
        return self.objectives_of(self.branches()[0])

    def losses(self, batch: Batch, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = self._outputs(batch)
        total, named = sum_terms(self._objectives(), outputs, batch, temperature)
        if self.collect_metrics:
            named |= outputs.metrics
            seen = outputs.computed_globals()
            if seen is not None:
                named[RANK] = rankme(seen.class_token)
        return total, named

    @torch.no_grad()
    def _outputs(self, batch: Batch) -> Outputs:
        images = self.normalize(batch.global_crops, batch.global_photometric)
        return Outputs(
            student=self.student,
            teachers=TeacherOutputs({TEACHER: lambda: self.teacher([images])[0]}),
            images=images,
            local_images=self.normalize(batch.local_crops, batch.local_photometric) if len(batch.local_crops) else None,
            gram_images=self.normalize(batch.gram_crops) if len(batch.gram_crops) else None,
            masks=batch.masks,
            collect_metrics=self.collect_metrics,
        )

    def begin_step(self, step: int) -> list[tuple[nn.Module, nn.Module]]:
        return [pair for objective in self._objectives() for pair in objective.begin_step(step, self.teacher)]

    def ema_pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.student, self.teacher
        for objective in self._objectives():
            yield from objective.head_pairs()
