"""Settings of distillation and publishing."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from distill.objectives.config import DinoIbotConfig, DistillObjective
from infra.config import Config, Output
from pretrain.backbones.config import BackboneConfig
from pretrain.config import TrainingSettings
from pretrain.data.config import IMAGENET_MEAN, IMAGENET_STD, Views
from pretrain.models.config import ModelConfig, TimmNetworkConfig, VisionTransformerConfig

FormatName = Literal["timm", "torch_hub", "transformers", "open_clip", "onnx", "torch_export", "official"]


class StudentSettings(Config):
    """One of the students that are trained in one run."""

    model: VisionTransformerConfig = VisionTransformerConfig()
    """Backbone. Stochastic depth is off."""
    timm: TimmNetworkConfig | None = None
    """Network of timm instead of `model`. null: none."""
    lr: float = Field(1.0, gt=0)
    """Factor of the learning rate."""
    init_from: str | None = None
    """URL of a checkpoint whose released backbone initializes the student. null: random initialization."""

    @property
    def network(self) -> ModelConfig:
        """Its backbone, whichever it is."""
        return self.timm or self.model.model_copy(update={"drop_path_rate": 0.0})


def _default_students() -> dict[str, StudentSettings]:
    return {"student": StudentSettings()}


def _default_objectives() -> list[DistillObjective]:
    return [DinoIbotConfig()]


class DistillSettings(TrainingSettings):
    """Settings of a distillation."""

    students: dict[str, StudentSettings] = Field(default_factory=_default_students, min_length=1)
    """Students by name, of any size, patch size and architecture. Each batch passes the teachers once for all of them.
    """
    objectives: list[DistillObjective] = Field(default_factory=_default_objectives, min_length=1)
    """Losses, optimized as their weighted sum for each student. The default is DINOv2's distillation."""
    teachers: dict[str, BackboneConfig] = Field(default_factory=dict)
    """Frozen teachers without heads, by name. The teacher checkpoint has the name teacher."""
    num_cached_views: int = Field(0, ge=0)
    """Number of fixed views of each image. Their teacher features are stored once, so that later epochs and
    distillations skip the teachers' forward pass; storage is 2 bytes × images × views × global crops × tokens × width.
    0: every view is new."""
    views: Views | None = None
    """Crops and augmentation. null: those of the teacher checkpoint."""

    @field_validator("students", "teachers")
    @classmethod
    def _plain_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        """They stand in the names of weights, files and terms; in one order, for initial weights hang on it."""
        for name in value:
            if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
                raise ValueError(f"{name!r} is no plain name; use small letters, digits, - and _")
        return dict(sorted(value.items()))

    @model_validator(mode="after")
    def _fits(self) -> DistillSettings:
        kinds = [each.kind for each in self.objectives]
        if len(set(kinds)) < len(kinds):
            raise ValueError("objectives: each kind may be given once")
        if "teacher" in self.teachers or "teacher" in self.students:
            raise ValueError("teachers, students: the name teacher is the teacher checkpoint's")
        if self.runtime.export_teacher_every and len(self.students) > 1:
            raise ValueError("runtime.export_teacher_every: writes one backbone; leave it 0 with several students")
        return self


class DistillConfig(DistillSettings, Output):
    """Distill students from frozen teachers; writes a checkpoint, or with several students one for each, at `out`, -
    and its name."""

    teacher_checkpoint: str | None = None
    """URL of a frozen pretraining checkpoint with its heads. null: only `teachers`."""
    corpora: list[str] = Field(min_length=1)
    """URLs of the corpora to distill on. A selection stands for the images that it keeps of its corpus."""
    teacher_cache: str | None = None
    """URL of the folder in which `num_cached_views` stores teacher features, which other distillations can share. null:
    `teacher_cache` beside the checkpoint."""
    out: str
    """URL of the checkpoint; {id} stands for its id."""


class PublishSettings(Config):
    """Name, license and formats of a published backbone."""

    name: str = Field("fovea-vit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the model."""
    license: str = "other"
    """License of the weights, as a Hugging Face identifier."""
    description: str = ""
    """Text at the top of the model card."""
    formats: list[FormatName] | None = None
    """Formats: timm, torch_hub, transformers, open_clip (of a model trained with captions), onnx, torch_export and
    official. transformers and onnx need the extra `publish`. null: timm, torch_hub and official, as far as the backbone
    has them."""
    tolerance: float = Field(1e-5, gt=0)
    """Maximum difference of any feature between Fovea and a format; a larger one fails the publication."""

    @field_validator("formats")
    @classmethod
    def _in_order(cls, value: list[FormatName] | None) -> list[FormatName] | None:
        """Each once, in one order; timm's folder where others stand on it."""
        if value is None:
            return None
        wanted = set(value) | ({"timm"} if set(value) & {"torch_hub", "onnx", "torch_export"} else set())
        return [each for each in get_args(FormatName) if each in wanted]


class PublishConfig(PublishSettings, Output):
    """Publish a checkpoint's released backbone; writes a backbone."""

    checkpoint: str
    """URL of the checkpoint whose released backbone is published."""
    images: str
    """URL of a corpus whose first images are used to compare features."""
    reports: list[str] = Field(default_factory=list)
    """URLs of evaluation reports for the model card."""
    hf_repo: str | None = Field(None, pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    """Repository OWNER/NAME of the Hugging Face Hub to upload to, tagged by the backbone's id. The token comes from
    HF_TOKEN or the Hub's login. null: no upload."""
    hf_private: bool = True
    """Make a new repository private."""
    out: str
    """URL of the backbone; {id} stands for its id."""


class ImportConfig(Output):
    """Import public weights; writes a checkpoint."""

    checkpoint: str
    """Path of the weights."""
    layout: Literal["official", "timm", "open_clip"] = "official"
    """Names of the weights: official (DINOv2's or DINOv3's code), timm (its Vision Transformers) or open_clip."""
    name: str | None = None
    """Name of an open_clip model, which sets `model`, `mean` and `std`. Read with `layout: open_clip`."""
    model: VisionTransformerConfig = VisionTransformerConfig()
    """Dimensions and parts of the trained network."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel that is subtracted, values 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel that is divided by."""
    out: str
    """URL of the checkpoint; {id} stands for its id."""
