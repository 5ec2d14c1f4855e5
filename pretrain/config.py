"""Everything a pretraining run can be told. Imports no torch, so that `fovea --help` stays quick."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from infra.config import Config, Output
from infra.launch.config import Launch, Launcher
from pretrain.data.config import Sampling, Views
from pretrain.models.config import Checkpointing, VisionTransformerConfig
from pretrain.objectives.config import (
    ClipConfig,
    DinoConfig,
    IbotConfig,
    KoleoConfig,
    ObjectiveConfig,
    SiglipConfig,
)


def _default_objectives() -> list[ObjectiveConfig]:
    return [DinoConfig(), IbotConfig(), KoleoConfig()]


Precision = Literal["fp32", "bf16"]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "prometheus"]


class Optimizer(Config):
    """AdamW with a linear warmup and cosine schedules."""

    base_lr: float = Field(4e-3, gt=0)
    """Peak learning rate at the reference batch size; `lr_scaling` scales it to the global batch size."""
    lr_reference_batch_size: int = Field(1024, ge=1)
    """Global batch size that `base_lr` refers to."""
    lr_scaling: Literal["sqrt", "linear", "none"] = "sqrt"
    """Dependence of the peak on global batch size / `lr_reference_batch_size`: square root (DINOv2), linear (MAE) or
    none."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warmup."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(0, ge=0)
    """Number of steps over which the learning rate rises from 0. 0: no warmup."""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """First and last weight decay, with a cosine between them. Biases, norms and LayerScale are not decayed."""
    weight_decay_tokens: bool = False
    """Decay class, register and mask tokens and the position table, as DINOv2 does."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    grad_clip: float | None = Field(3.0, gt=0)
    """Maximum norm of the gradient. null: no clipping."""
    grad_clip_scope: Literal["all", "parts"] = "all"
    """Norm that is clipped: of the whole gradient (all), or of backbone and each head separately (parts), as in DINOv2.
    """
    layerwise_lr_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the learning rate from each block to the block before it. 1: none."""
    patch_embed_lr_mult: float = Field(0.2, gt=0)
    """Factor of the learning rate of the patch embedding."""
    freeze_last_layer_steps: int = Field(0, ge=0)
    """Number of first steps in which the prototypes are frozen. 0: none."""


class Teacher(Config):
    """The teacher: an exponential moving average of the student, in float32."""

    momentum: tuple[float, float] = (0.992, 1.0)
    """First and last momentum, with a cosine between them."""
    temperature: tuple[float, float] = (0.04, 0.07)
    """First and last softmax temperature of the teacher."""
    temperature_warmup_steps: int = Field(0, ge=0)
    """Number of steps over which the temperature changes linearly. 0: it starts at its last value."""


class Sharding(Config):
    """Backend, ZeRO stage, precision and offloading."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """Training backend: deepspeed, or torch (one process without sharding)."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage: 1 shards the optimizer, 2 also the gradients, 3 also the parameters and the teacher."""
    precision: Precision = "fp32"
    """Precision of matrix products. Parameters, optimizer and teacher stay in float32."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Location of the optimizer's state: none (GPU), cpu (memory) or nvme (files; stage 3). With cpu and nvme, the CPU
    runs the optimizer step."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Location of each rank's shard of parameters and teacher in stage 3: none (GPU) or cpu (memory)."""
    nvme_path: str | None = None
    """Folder on a local disk for `offload_optimizer: nvme`, used by this training alone."""

    @model_validator(mode="after")
    def _offload_fits(self) -> Sharding:
        offloads = (self.offload_optimizer, self.offload_parameters)
        if self.backend == "torch" and offloads != ("none", "none"):
            raise ValueError("sharding: backend torch keeps everything where it is; offload with deepspeed")
        if self.offload_optimizer != "none" and self.zero_stage < (3 if self.offload_optimizer == "nvme" else 1):
            raise ValueError("sharding: offload_optimizer needs zero_stage 1 or more, nvme 3")
        if self.offload_parameters != "none" and self.zero_stage < 3:
            raise ValueError("sharding: offload_parameters needs zero_stage 3")
        if self.offload_optimizer == "nvme" and self.nvme_path is None:
            raise ValueError("sharding: offloading to nvme needs nvme_path")
        return self


class Probe(Config):
    """kNN on the frozen teacher at intervals."""

    train: str
    """URL of the labeled corpus of neighbors."""
    test: str
    """URL of the labeled corpus to classify."""
    every: int = Field(1000, ge=1)
    """Steps between scores."""
    k: int = Field(20, ge=1)
    """Number of neighbors."""


class Guards(Config):
    """Limits for bad losses. A step with a loss or gradient that is not finite is skipped on all ranks; teacher and
    centers do not change."""

    loss_spike_threshold: float | None = Field(20.0, gt=0)
    """Number of mean deviations above the median of the last 200 steps from which a loss is skipped as a spike. null:
    spikes are not skipped."""
    max_consecutive_skips: int = Field(20, ge=1)
    """Number of consecutive skipped steps after which the training rolls back to its last state and continues with
    other samples."""
    max_rollbacks: int = Field(3, ge=0)
    """Maximum number of rollbacks before the training stops."""


class Collapse(Config):
    """Monitor of collapse. It measures at intervals and warns below its thresholds."""

    every: int = Field(100, ge=0)
    """Steps between measurements. 0: never."""
    min_usage: float = Field(0.1, ge=0, le=1)
    """Minimum entropy of the mean teacher target as a share of its maximum. Below it, few prototypes are used."""
    min_kl: float = Field(1e-4, ge=0)
    """Minimum mean divergence of the student from the targets, in nats. Below it, nothing is left to learn."""
    min_rank: float = Field(1.5, ge=1)
    """Minimum effective rank (RankMe) of the class tokens of a batch."""
    stop_after: int | None = Field(None, ge=1)
    """Number of consecutive alarms after which the training stops. null: it only warns."""
    probe: Probe | None = None
    """Labeled corpora on which kNN scores the teacher during training. null: no probe."""


class Retention(Config):
    """Retention of saved states: the last few, and all recent ones."""

    latest: int = Field(1, ge=1)
    """Number of last states to keep."""
    hours: float = Field(0.0, ge=0)
    """Age in hours up to which older states are kept, too. 0: only the last ones."""


class Runtime(Config):
    """Runtime settings. They do not change the checkpoint's id and may differ when a run resumes."""

    micro_batch_size: int | None = Field(None, ge=1)
    """Images in a forward pass on one rank; gradients are accumulated up to the global batch size. null: the global
    batch size divided by the number of ranks. Sinkhorn-Knopp balances the micro-batches of all ranks together; KoLeo
    spreads each one's."""

    num_workers: int = Field(2, ge=0)
    """Number of loader processes for each rank. 0 loads in the training process."""
    cache_gb: float = Field(0.0, ge=0)
    """Size in GB of a local disk cache for remote shards, shared by all processes of a machine. 0: no cache; otherwise
    at least 0.1. It applies where it holds the whole corpora or `sampling.shuffle` is shard_window."""
    hang_timeout_s: float = Field(1200.0, gt=0)
    """Seconds without progress of any rank after which the job ends and names the rank that blocks the others."""
    max_bad_sample_fraction: float = Field(0.01, ge=0, le=1)
    """Maximum share of unusable samples. Each is replaced by another sample; above the share, the training stops."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between saved states. They are written while the training continues."""
    export_teacher_every: int = Field(0, ge=0)
    """Steps between exported teachers (in a distillation, averages). Each is a checkpoint beside the final one, for
    evaluation during training. 0: none."""
    trackers: list[TrackerName] = Field(default_factory=list)
    """Experiment trackers that receive every step's metrics. The job's folder stores them in any case."""
    keep: Retention = Retention()
    """Retention of saved states during training."""
    activation_checkpointing: Checkpointing = "none"
    """Activations that the backward pass recomputes to save memory: none, all but matrix products and attention, or
    whole blocks."""
    compile: bool = False
    """Compile each block with torch.compile."""

    @field_validator("cache_gb")
    @classmethod
    def _cache_holds_blocks(cls, value: float) -> float:
        if 0 < value < 0.1:
            raise ValueError("cache_gb below 0.1 would hold next to nothing")
        return value


class Schedule(Config):
    """Number of steps, global batch size and seed."""

    steps: int = Field(125_000, ge=1)
    """Number of optimizer steps."""
    global_batch_size: int = Field(64, ge=1)
    """Images in a step, over all ranks."""
    seed: int = Field(0, ge=0)
    """Seed of weights, sample order, augmentation, masks and dropout."""


class TrainingSettings(Config):
    """Settings that pretraining and distillation share."""

    sampling: Sampling = Sampling()
    """Order of the samples."""
    schedule: Schedule = Schedule()
    """Number of steps, global batch size and seed."""
    optimizer: Optimizer = Optimizer()
    """Optimizer and its schedules."""
    teacher: Teacher = Teacher()
    """Momentum and temperature of the teacher. In a distillation, the momentum is that of the students' averages, which
    are released."""
    guards: Guards = Guards()
    """Limits for skipped steps and rollbacks."""
    collapse: Collapse = Collapse()
    """Thresholds of the collapse monitor."""
    sharding: Sharding = Sharding()
    """Backend, ZeRO stage, precision and offloading."""
    runtime: Runtime = Runtime()
    """Runtime settings. They do not change the checkpoint's id and may differ when a run resumes."""
    launcher: Launcher = "local"
    """Program that starts the ranks: local (this process, or one rank of an external launcher), torchrun, deepspeed or
    slurm."""
    launch: Launch = Launch()
    """Machines, restarts and SLURM options."""


class PretrainSettings(TrainingSettings):
    """Settings of a pretraining run."""

    model: VisionTransformerConfig = VisionTransformerConfig()
    """The backbone."""
    objectives: list[ObjectiveConfig] = Field(default_factory=_default_objectives, min_length=1)
    """Losses, optimized as their weighted sum. The default is DINOv2's: dino, ibot and koleo."""
    views: Views = Views()
    """Crops and augmentation."""

    @model_validator(mode="after")
    def _crops_fit_patches(self) -> PretrainSettings:
        for name, size in self.views.sizes().items():
            if size % self.model.patch_size:
                raise ValueError(f"{name} {size} is no multiple of patch_size {self.model.patch_size}")
        return self

    @model_validator(mode="after")
    def _objectives_fit(self) -> PretrainSettings:
        kinds = [objective.kind for objective in self.objectives]
        if len(set(kinds)) < len(kinds):
            raise ValueError("objectives: each kind may be given once")
        if kinds == ["gram"]:
            raise ValueError("objectives: gram anchors what other objectives learn; add one")
        contexts = {each.text.context for each in self.objectives if isinstance(each, ClipConfig | SiglipConfig)}
        if len(contexts) > 1:
            raise ValueError("objectives: clip and siglip read the same captions; give both the same text.context")
        if self.views.num_global_crops < 2 and (alone := {"dino", "ibot", "koleo"} & set(kinds)):
            raise ValueError(f"objectives: {min(alone)} needs views.num_global_crops 2")
        if any(isinstance(each, IbotConfig) and each.share_head for each in self.objectives) and "dino" not in kinds:
            raise ValueError("objectives: ibot cannot have share_head without dino")
        if "mae" in kinds and self.model.pos_embed == "rope":
            raise ValueError("objectives: mae needs model.pos_embed sincos or learned")
        if "mae" in kinds and self.views.global_crops.size != self.model.image_size:
            raise ValueError("objectives: mae needs views.global_crops.size equal to model.image_size")
        return self


class PretrainConfig(PretrainSettings, Output):
    """Pretrain a teacher on corpora; writes a checkpoint."""

    corpora: list[str] = Field(min_length=1)
    """URLs of the corpora to train on. A selection stands for the images that it keeps of its corpus."""
    init_from: str | None = None
    """URL of a pretraining checkpoint whose weights and heads initialize the training. Image and crop sizes may differ,
    as in a high-resolution phase. null: random initialization."""
    out: str
    """URL of the checkpoint; {id} stands for its id."""


class PlanConfig(PretrainSettings):
    """A recipe and the machines to estimate it for."""

    gpus: int = Field(ge=1)
    """Number of GPUs over all machines."""
    gpu: str = "h100"
    """GPU model: a100-40gb, a100, h100-pcie, h100, h200, b200, l40s, l4, a10g, rtx4090 or rtx3090."""
    gib: float | None = Field(None, gt=0)
    """Memory of one GPU in GiB. null: the data sheet's value."""
    tflops: float | None = Field(None, gt=0)
    """Dense peak of one GPU in TFLOP/s at the recipe's precision. null: the data sheet's value."""
    mfu: float = Field(0.4, gt=0, le=1)
    """Expected share of the peak (MFU). `fovea pretrain` shows the measured one."""
    price: float | None = Field(None, gt=0)
    """Price of one GPU for an hour, in any currency. null: no cost is printed."""
    corpora: list[str] = Field(default_factory=list)
    """Not read."""
    init_from: str | None = None
    """Not read."""
    out: str | None = None
    """Not read."""


PLACES = ("corpora", "init_from", "teacher_checkpoint", "teacher_cache", "out", "restart")
"""Keys that name places; inputs are known by their ids."""
LAUNCHING = ("launcher", "launch")
_SPREADING = {"backend", "zero_stage", "offload_optimizer", "offload_parameters", "nvme_path"}


def identity_settings(config: Config) -> dict[str, object]:
    """The settings that decide a stage's result: all but where it reads, where it writes and how it is carried out."""
    how: dict[str, Any] = dict.fromkeys([*PLACES, *LAUNCHING, "runtime", "guards", "collapse"], True)
    return config.model_dump(mode="json", exclude=how | {"sharding": _SPREADING})
