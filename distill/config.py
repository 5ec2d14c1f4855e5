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
    """One of the students that learn in one run."""

    model: VisionTransformerConfig = VisionTransformerConfig()
    """Its backbone; stochastic depth is off."""
    timm: TimmNetworkConfig | None = None
    """A network of timm in place of `model`."""
    lr: float = Field(1.0, gt=0)
    """Factor of its learning rate."""
    init_from: str | None = None
    """URL of a checkpoint whose released backbone it starts from; null: from initial weights."""

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
    """Students by name, of any size, patch size and make. Each batch goes through the teachers once for all of them."""
    objectives: list[DistillObjective] = Field(default_factory=_default_objectives, min_length=1)
    """Losses; their weighted sum is optimized, for each student. The default is DINOv2's distillation."""
    teachers: dict[str, BackboneConfig] = Field(default_factory=dict)
    """Frozen teachers without heads, by name, beside the teacher checkpoint, whose name is teacher."""
    num_cached_views: int = Field(0, ge=0)
    """Views of each image after which they come again, epoch by epoch, so that what the teachers say of them is
    computed once and kept as an artifact; 0: all views are new, and the teachers run along. Kept are 2 bytes a number:
    images x views x global crops x tokens x width."""
    views: Views | None = None
    """Crops and augmentation; null: those that the teacher checkpoint was trained with."""

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
    """Teachers and corpora in; out a checkpoint, or with several students one for each, at its URL, - and its name."""

    teacher_checkpoint: str | None = None
    """URL of a pretraining checkpoint, with its heads, which teaches frozen; null: `teachers` alone do."""
    corpora: list[str] = Field(min_length=1)
    """URLs of the corpora to distill on, or of selections: of those, what they keep of their corpus."""
    teacher_cache: str | None = None
    """URL of the folder in which `num_cached_views` stores teacher features, which other distillations can share. null:
    `teacher_cache` beside the checkpoint."""
    out: str
    """URL of the checkpoint; {id} stands for its id."""


class PublishSettings(Config):
    """What a published backbone says of itself."""

    name: str = Field("fovea-vit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the model."""
    license: str = "other"
    """License of the weights, as a Hugging Face identifier."""
    description: str = ""
    """A sentence or two for the top of the model card."""
    formats: list[FormatName] | None = None
    """What it is published as: timm's folder, torch.hub's, transformers', open_clip's (of a model trained with
    captions), an ONNX graph, torch.export's, weights under the official names. transformers and onnx need the extra
    `publish`. null: timm, torch_hub and official, as far as the backbone has them."""
    tolerance: float = Field(1e-5, gt=0)
    """Largest difference of any feature between Fovea and each format; a larger one fails the publication."""

    @field_validator("formats")
    @classmethod
    def _in_order(cls, value: list[FormatName] | None) -> list[FormatName] | None:
        """Each once, in one order; timm's folder where others stand on it."""
        if value is None:
            return None
        wanted = set(value) | ({"timm"} if set(value) & {"torch_hub", "onnx", "torch_export"} else set())
        return [each for each in get_args(FormatName) if each in wanted]


class PublishConfig(PublishSettings, Output):
    """Checkpoint and reports in, backbone out."""

    checkpoint: str
    """URL of the checkpoint whose released backbone is published."""
    images: str
    """URL of a corpus; features of its first images are compared between Fovea and each format."""
    reports: list[str] = Field(default_factory=list)
    """URLs of evaluation reports for the model card."""
    hf_repo: str | None = Field(None, pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    """OWNER/NAME of a repository of the Hugging Face Hub that it is uploaded to as well, with its id as a tag; the
    token comes from HF_TOKEN or the Hub's own login."""
    hf_private: bool = True
    """A repository that is made for it is private."""
    out: str
    """URL of the backbone; {id} stands for its id."""


class ImportConfig(Output):
    """Weights of others in, checkpoint out."""

    checkpoint: str
    """Path of the weights on this machine: a state dict, or a training's teacher."""
    layout: Literal["official", "timm", "open_clip"] = "official"
    """Whose names they have: the official DINOv2 or DINOv3 code's, timm's Vision Transformers', or open_clip's."""
    name: str | None = None
    """Of layout open_clip the model's name there, which tells all of `model`, `mean` and `std`."""
    model: VisionTransformerConfig = VisionTransformerConfig()
    """The dimensions and parts it was trained with."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel that is subtracted, values 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel that is divided by."""
    out: str
    """URL of the checkpoint; {id} stands for its id."""
