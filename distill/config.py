"""Settings of distillation and publishing."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator

from infra.config import Config
from infra.launch.config import Launch, Launcher
from pretrain.config import Guards, Health, Optimizer, Runtime, Schedule, Sharding, Teacher
from pretrain.data.config import IMAGENET_MEAN, IMAGENET_STD, Sampling
from pretrain.models.config import VisionTransformerConfig

FormatName = Literal["timm", "hub", "transformers", "onnx", "torch_export", "official"]


class DistillSettings(Config):
    """Settings of a distillation. Objectives, heads and views are the teacher's."""

    model: VisionTransformerConfig = VisionTransformerConfig()
    """The student; its patch size is the teacher's."""
    sampling: Sampling = Sampling()
    """Order of the samples."""
    schedule: Schedule = Schedule()
    """Length and batch."""
    optimizer: Optimizer = Optimizer()
    """Optimiser and its schedules."""
    average: Teacher = Teacher()
    """The moving average of the student, which is what is released, and the frozen teacher's temperature."""
    guards: Guards = Guards()
    """What happens when losses go wrong."""
    health: Health = Health()
    """What counts as collapse."""
    sharding: Sharding = Sharding()
    """Ranks and precision."""
    runtime: Runtime = Runtime()
    """Speed only."""
    launcher: Launcher = "local"
    """What starts the ranks: this process alone, or one of several that a launcher started; or torchrun, DeepSpeed's
    launcher or SLURM."""
    launch: Launch = Launch()
    """Where the ranks run."""


class DistillConfig(DistillSettings):
    """Teacher checkpoint and corpora in, student checkpoint out."""

    teacher_checkpoint: str
    """URL of the checkpoint of the frozen teacher, with its heads."""
    corpora: list[str] = Field(min_length=1)
    """URLs of the corpora to distill on, or of selections: of those, what they keep of their corpus."""
    out: str
    """URL of the checkpoint; {id} stands for its id."""


class PublishSettings(Config):
    """What a published backbone says of itself."""

    name: str = Field("fovea-vit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the model."""
    license: str = "other"
    """Licence of the weights, as a Hugging Face identifier."""
    description: str = ""
    """A sentence or two for the top of the model card."""
    formats: list[FormatName] = Field(default_factory=lambda: list[FormatName](["timm", "hub", "official"]))
    """What it is published as, beside timm's folder: torch.hub's, transformers', an ONNX graph, torch.export's, weights
    under the official names. transformers and onnx need the extra `publish`."""
    tolerance: float = Field(1e-5, gt=0)
    """Largest difference of any feature between Fovea and each format; a larger one fails the publication."""

    @field_validator("formats")
    @classmethod
    def _timm_first(cls, value: list[FormatName]) -> list[FormatName]:
        """Each once, in one order, timm's folder always: others stand on it."""
        return [each for each in get_args(FormatName) if each == "timm" or each in value]


class PublishConfig(PublishSettings):
    """Checkpoint and reports in, backbone out."""

    checkpoint: str
    """URL of the checkpoint whose released backbone is published."""
    images: str
    """URL of a corpus; features of its first images are compared between Fovea and each format."""
    reports: list[str] = Field(default_factory=list)
    """URLs of evaluation reports for the model card."""
    out: str
    """URL of the backbone; {id} stands for its id."""


class ImportConfig(Config):
    """Weights of others in, checkpoint out."""

    checkpoint: str
    """Path of the weights on this machine: a state dict, or a training's teacher."""
    layout: Literal["official", "timm"] = "official"
    """Whose names they have: the official DINOv2 or DINOv3 code's, or timm's Vision Transformers'."""
    model: VisionTransformerConfig = VisionTransformerConfig()
    """The dimensions and parts it was trained with."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel that is subtracted, values 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel that is divided by."""
    out: str
    """URL of the checkpoint; {id} stands for its id."""
