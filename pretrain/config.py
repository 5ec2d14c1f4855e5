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
    """Peak learning rate at the reference batch; `lr_scaling` scales it to the global batch."""
    lr_reference_batch_size: int = Field(1024, ge=1)
    """Global batch for which `base_lr` is meant."""
    lr_scaling: Literal["sqrt", "linear", "none"] = "sqrt"
    """How the peak depends on global batch / `lr_reference_batch_size`: on its square root (DINOv2), in proportion
    (MAE), or not."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on after the warmup."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end of a cosine."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0."""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """First and last weight decay; a cosine between. Biases, norms and LayerScale have none."""
    weight_decay_tokens: bool = False
    """Decay class, register and mask tokens and the position table too, as DINOv2 does."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment factors."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's guard of the division."""
    grad_clip: float | None = Field(3.0, gt=0)
    """Largest norm of a gradient; null: any."""
    grad_clip_scope: Literal["all", "parts"] = "all"
    """Whose norm: the whole gradient's, or each of backbone and heads by itself, as DINOv2 does."""
    layerwise_lr_decay: float = Field(1.0, gt=0, le=1)
    """Factor of the learning rate from each block to the one before it."""
    patch_embed_lr_mult: float = Field(0.2, gt=0)
    """Factor of the learning rate of the patch embedding."""
    freeze_last_layer_steps: int = Field(0, ge=0)
    """Steps in which the prototypes stay as they are."""


class Teacher(Config):
    """The teacher: an exponential moving average of the student, in float32."""

    momentum: tuple[float, float] = (0.992, 1.0)
    """First and last momentum; a cosine between."""
    temperature: tuple[float, float] = (0.04, 0.07)
    """First and last softmax temperature of the teacher."""
    temperature_warmup_steps: int = Field(0, ge=0)
    """Steps over which the temperature rises."""


class Sharding(Config):
    """How the training is spread over ranks."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """deepspeed, or plain torch: one process, the oracle of tests."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage: 1 shards the optimizer, 2 the gradients too, 3 the parameters and the teacher too."""
    precision: Precision = "fp32"
    """Precision of matrix products; parameters, optimizer and teacher stay in float32."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's moments, gradients and own weights are kept: on the GPU, or in memory or (stage 3) in
    files of the machine; then the CPU steps."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where stage 3 keeps each rank's part of the parameters, the teacher's too."""
    nvme_path: str | None = None
    """Folder on a local disk for what goes to nvme, of this training alone; each rank has its own files there."""

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
    """kNN on the frozen teacher, now and then."""

    train: str
    """URL of the labeled corpus that votes."""
    test: str
    """URL of the labeled corpus that is classified."""
    every: int = Field(1000, ge=1)
    """Steps between scores."""
    k: int = Field(20, ge=1)
    """Neighbors that vote."""


class Guards(Config):
    """What happens when losses go wrong. A step whose loss or gradient is no finite number is always skipped, on all
    ranks, and teacher and centers stay as they were."""

    loss_spike_threshold: float | None = Field(20.0, gt=0)
    """A loss this many mean deviations above the median of the last 200 steps is skipped too; null: never."""
    max_consecutive_skips: int = Field(20, ge=1)
    """Skipped steps in a row after which the training goes back to its last checkpoint, and on with other samples."""
    max_rollbacks: int = Field(3, ge=0)
    """Times it may go back before it stops."""


class Collapse(Config):
    """When what is learned counts as collapsed. Looked at now and then; a warning each time."""

    every: int = Field(100, ge=0)
    """Steps between looks; 0: never."""
    min_usage: float = Field(0.1, ge=0, le=1)
    """Least entropy of the mean teacher target, as a share of the most it can be: below, few prototypes are used."""
    min_kl: float = Field(1e-4, ge=0)
    """Least mean divergence of the student from the targets, in nats: below, there is nothing left to learn."""
    min_rank: float = Field(1.5, ge=1)
    """Least effective rank (RankMe) of the class tokens of a batch."""
    stop_after: int | None = Field(None, ge=1)
    """Alarming looks in a row after which the training stops; null: it goes on."""
    probe: Probe | None = None
    """A small labeled set on which the teacher is scored by its nearest neighbors while it trains."""


class Retention(Config):
    """Which saved states of a training stay when newer ones have come: the last few, and all young ones."""

    latest: int = Field(1, ge=1)
    """The last states that are kept."""
    hours: float = Field(0.0, ge=0)
    """Older ones are kept until this many hours after they were written."""


class Runtime(Config):
    """How a run is carried out: no part of what a checkpoint is known by, and free to change when it goes on."""

    micro_batch_size: int | None = Field(None, ge=1)
    """Images a rank and forward pass; what is missing to the global batch is accumulated. null: the global batch by the
    number of ranks. Sinkhorn-Knopp balances the micro-batches of all ranks at once, KoLeo spreads each one's."""

    num_workers: int = Field(2, ge=0)
    """Loader processes a rank; 0 loads in the training process."""
    cache_gb: float = Field(0.0, ge=0)
    """Parts of remote shards kept on a local disk, in GB, for all processes of a machine; 0: none, else 0.1 or more.
    Used where it holds the whole corpora, or shards are read in windows."""
    hang_timeout_s: float = Field(1200.0, gt=0)
    """How long no rank may move on before the job ends and names the one that the others wait for."""
    max_bad_sample_fraction: float = Field(0.01, ge=0, le=1)
    """Share of samples that may turn out unusable, each passed over for another one, before the run stops."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps between states to resume from; they are written while the training goes on."""
    export_teacher_every: int = Field(0, ge=0)
    """Steps between teachers (of a distillation: averages) that are written beside the checkpoint, as checkpoints of
    their own that stay, for evaluation while the training goes on; 0: none."""
    trackers: list[TrackerName] = Field(default_factory=list)
    """Experiment trackers that get every step's telemetry, which the job's folder has anyway."""
    keep: Retention = Retention()
    """Which of these states are kept until the training ends."""
    activation_checkpointing: Checkpointing = "none"
    """What the backward pass computes again to save memory: nothing, all but matrix products and attention, or whole
    blocks."""
    compile: bool = False
    """Compile each block with torch.compile."""

    @field_validator("cache_gb")
    @classmethod
    def _cache_holds_blocks(cls, value: float) -> float:
        if 0 < value < 0.1:
            raise ValueError("cache_gb below 0.1 would hold next to nothing")
        return value


class Schedule(Config):
    """How long, on how much, from which seed."""

    steps: int = Field(125_000, ge=1)
    """Optimizer steps."""
    global_batch_size: int = Field(64, ge=1)
    """The global batch: images a step, over all ranks."""
    seed: int = Field(0, ge=0)
    """Seed of weights, order, augmentation, masks and dropout."""


class TrainingSettings(Config):
    """Settings that pretraining and distillation share."""

    sampling: Sampling = Sampling()
    """Order of the samples."""
    schedule: Schedule = Schedule()
    """Length and batch."""
    optimizer: Optimizer = Optimizer()
    """Optimizer and its schedules."""
    teacher: Teacher = Teacher()
    """Schedules of the teacher; in a distillation the momentum is that of the students' averages, which are released.
    """
    guards: Guards = Guards()
    """What happens when losses go wrong."""
    collapse: Collapse = Collapse()
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


class PretrainSettings(TrainingSettings):
    """Settings of a pretraining run."""

    model: VisionTransformerConfig = VisionTransformerConfig()
    """The backbone."""
    objectives: list[ObjectiveConfig] = Field(default_factory=_default_objectives, min_length=1)
    """Losses; their weighted sum is optimized. The default is DINOv2's."""
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
    """Corpora in, teacher checkpoint out."""

    corpora: list[str] = Field(min_length=1)
    """URLs of the corpora to train on, or of selections: of those, what they keep of their corpus."""
    init_from: str | None = None
    """URL of a pretraining checkpoint to start from, weights and heads; image and crop sizes may differ (a
    high-resolution phase)."""
    out: str
    """URL of the checkpoint; {id} stands for its id."""


class PlanConfig(PretrainSettings):
    """A recipe, and the machines it is planned for."""

    gpus: int = Field(ge=1)
    """How many GPUs, over all machines."""
    gpu: str = "h100"
    """Which: a100-40gb, a100, h100-pcie, h100, h200, b200, l40s, l4, a10g, rtx4090 or rtx3090."""
    gib: float | None = Field(None, gt=0)
    """Memory of one in GiB; null: what its data sheet says."""
    tflops: float | None = Field(None, gt=0)
    """Dense peak of one in TFLOP/s at the recipe's precision; null: what its data sheet says."""
    mfu: float = Field(0.4, gt=0, le=1)
    """Share of the peak that is expected; `fovea pretrain` shows what a training reaches."""
    price: float | None = Field(None, gt=0)
    """What a GPU costs an hour, in any currency; null: no cost is given."""
    corpora: list[str] = Field(default_factory=list)
    """Not read."""
    init_from: str | None = None
    """Not read."""
    out: str | None = None
    """Not read."""


PLACES = (
    "corpora",
    "init_from",
    "teacher_checkpoint",
    "teacher_cache",
    "out",
    "restart",
)  # inputs are known by their ids
LAUNCHING = ("launcher", "launch")
_SPREADING = {"backend", "zero_stage", "offload_optimizer", "offload_parameters", "nvme_path"}


def identity_settings(config: Config) -> dict[str, object]:
    """The settings that decide a stage's result: all but where it reads, where it writes and how it is carried out."""
    how: dict[str, Any] = dict.fromkeys([*PLACES, *LAUNCHING, "runtime", "guards", "collapse"], True)
    return config.model_dump(mode="json", exclude=how | {"sharding": _SPREADING})
