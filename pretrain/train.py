"""The pretraining stage: corpora to a teacher checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.artifacts import Artifact, ArtifactSpec, cache_directory, find, open_artifact, produce, work_directory
from infra.cache import BlockCache
from infra.config import Output
from infra.errors import UserError
from pretrain import checkpoints, telemetry
from pretrain.checkpoints import Checkpoint, Description
from pretrain.config import PretrainConfig, PretrainSettings, TrainingSettings
from pretrain.data.config import Views
from pretrain.data.loader import ViewDataset
from pretrain.data.masks import MaskPlan
from pretrain.data.samples import Part, Samples
from pretrain.learner import Learner, Pretraining
from pretrain.models.execution import Execution
from pretrain.models.vit import VisionTransformer
from pretrain.networks import start_from
from pretrain.objectives.build import build as build_objectives
from pretrain.objectives.config import ClipConfig, SiglipConfig
from pretrain.objectives.image_text import tokenizer
from pretrain.ranks import barrier, world
from pretrain.reporting import Probe, Task
from pretrain.specs import checkpoint_spec
from pretrain.state_files import RESUME_FROM, remove_remote
from pretrain.trainer import Trainer, TrainResult

_log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, probe: Probe | None = None) -> Artifact:
    """Train student and teacher; return the checkpoint artifact.

    Args:
        probe: scores the teacher every `collapse.probe.every` steps.

    Raises:
        UserError: a corpus is missing or empty, or the loss is no longer finite.
    """

    def write(directory: Path) -> Mapping[str, Any]:
        dataset, url = view_dataset(config.corpora, config), planned.resolve(config.out)
        learner = build_learner(config)
        if config.init_from:
            start_from(Checkpoint.open(config.init_from), learner)
        build, described = (lambda: build_learner(config)), [Description.of(config)]
        trained = train(Task("pretrain", config, described, dataset, build, directory, url, planned, probe), learner)
        if world()[0] == 0:
            checkpoints.write(trained.weights, described[0], directory)
        return training_metrics(trained, dataset, "student.")

    planned = checkpoint_spec(config)
    return produce_together(planned, config, write)


def train(task: Task, learner: Learner) -> TrainResult:
    """Train a learner to the end.

    Raises:
        UserError: the settings ask for a probe that is not there, or the training goes wrong.
    """
    settings = task.settings
    if settings.collapse.probe is not None and task.probe is None:
        raise UserError("collapse.probe: nobody scores here; `fovea pretrain` does, or pass a probe to pretrain.run")
    learner.precision = settings.sharding.precision
    execution = Execution(settings.runtime.activation_checkpointing, settings.runtime.compile)
    learner.execute(execution)
    for part in learner.parts():
        backend = getattr(part.student.config, "attention", "timm's")
        _log.info("%sattention: %s; blocks: %s", part.prefix, backend, execution)
    return Trainer(task, learner).run()


def produce_together(plan: ArtifactSpec, output: Output, write: Callable[[Path], Mapping[str, Any]]) -> Artifact:
    """`produce` on all ranks of a training: every rank trains, the first one commits."""
    url = plan.resolve(output.out)
    if world()[0] == 0 or find(url) is not None:
        produce(plan, output.out, write, RESUME_FROM, output.restart)
    else:
        write(work_directory(plan, output.out))
    if world()[0] == 0:
        remove_remote(url)
    barrier()
    return open_artifact(url, "checkpoint")


Tokenize = Callable[[Sequence[str]], Tensor]


def view_dataset(corpora: Sequence[str], settings: PretrainSettings) -> ViewDataset:
    """Views of the samples of some corpora or selections, as a pretraining's objectives read them."""
    texts = [each.text for each in settings.objectives if isinstance(each, ClipConfig | SiglipConfig)]
    tokenize = tokenizer(texts[0]) if texts else None
    return dataset_of(corpora, settings, settings.views, settings.model.patch_size, tokenize)


def dataset_of(
    corpora: Sequence[str],
    settings: TrainingSettings,
    views: Views,
    patch_size: int,
    tokenize: Tokenize | None = None,
    labelled: bool = False,
    repeats: int = 0,
) -> ViewDataset:
    """Views of the samples of some corpora or selections.

    Args:
        patch_size: of the patch tokens that masks cover.
        tokenize: captions to token ids, where an objective reads them; then every sample must have one.
        labelled: an objective reads classes; then every sample must have one.
        repeats: views of a sample after which the first one comes again; 0: none does.
    """
    samples = Samples([Part.open(url) for url in corpora])
    _cache(samples, settings)
    if tokenize is not None:
        for part in samples.parts:
            _ = part.corpus.captions  # raises now, not in a worker, if one is missing
    if labelled:
        for part in samples.parts:
            _ = part.corpus.labels
    masks = MaskPlan.of(views, patch_size)
    return ViewDataset(samples, views, masks, settings.schedule.seed, settings.sampling, tokenize, labelled, repeats)


def _cache(samples: Samples, settings: TrainingSettings) -> None:
    """Keep parts of shards on the local disk, where that saves reading them again."""
    max_bytes = int(settings.runtime.cache_gb * 1e9)
    whole = sum(part.corpus.total_bytes for part in samples.parts)
    if max_bytes == 0:
        return
    if settings.sampling.shuffle == "full" and whole > max_bytes:
        _log.warning("cache_gb: %.1f GB of shards do not fit, so images are read one by one, uncached", whole / 1e9)
        return
    cache = BlockCache(cache_directory() / "blocks", max_bytes)
    for part in samples.parts:
        part.corpus.cache = cache


def build_learner(settings: PretrainSettings) -> Pretraining:
    """Student, teacher and heads with the initial weights of the settings' seed; the teacher starts as the student."""
    torch.manual_seed(settings.schedule.seed)
    student = VisionTransformer(settings.model)
    teacher = VisionTransformer(settings.model.model_copy(update={"drop_path_rate": 0.0}))
    teacher.load_state_dict(student.state_dict())
    torch.manual_seed(settings.schedule.seed + 1)
    losses = build_objectives(settings.objectives, settings.model, settings.model)
    return Pretraining(student, teacher, losses, settings.views)


def training_metrics(trained: TrainResult, dataset: ViewDataset, student: str) -> dict[str, Any]:
    """Metrics of a checkpoint.

    Args:
        student: what the names of its student's weights begin with.
    """
    last = next((row for row in reversed(trained.metrics) if telemetry.SKIPPED not in row), {})
    return {
        "images": dataset.samples.size,
        "unusable": trained.unusable,
        "skipped": trained.tally.skipped,
        "rewinds": trained.tally.rewinds,
        "steps": len(trained.metrics),
        "images_seen": trained.tally.samples,
        "parameters": sum(value.numel() for name, value in trained.weights.items() if name.startswith(student)),
        "loss": telemetry.losses(last),
        "images_per_second": round(trained.images_per_second, 1),
        **{name: round(trained.speed[name], 3) for name in ("mfu", "memory_gb") if name in trained.speed},
        **trained.compute,
        "resumed_at": trained.resumed_at,
    }
