"""The pretraining stage: corpora to a teacher checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.artifacts.artifact import (
    Artifact,
    ArtifactSpec,
    cache_directory,
    find,
    get_or_create,
    open_artifact,
    staging_dir,
)
from infra.config import Output
from infra.errors import UserError
from infra.storage.block_cache import BlockCache
from pretrain.checkpoint import artifact
from pretrain.checkpoint.artifact import Checkpoint, CheckpointDescription
from pretrain.checkpoint.spec import checkpoint_spec
from pretrain.checkpoint.state_files import RESUME_FROM, remove_remote
from pretrain.config import PretrainConfig, PretrainSettings, TrainingSettings
from pretrain.data.config import Views
from pretrain.data.loader import ViewDataset
from pretrain.data.masks import MaskSettings
from pretrain.data.samples import CorpusPart, Samples
from pretrain.distributed import barrier, rank_and_world_size
from pretrain.models.execution import Execution
from pretrain.models.vit import VisionTransformer
from pretrain.monitoring import metrics_log
from pretrain.monitoring.reporter import Probe, TrainJob
from pretrain.networks import init_from_checkpoint
from pretrain.objectives.build import build_objectives as build_objectives
from pretrain.objectives.config import ClipConfig, SiglipConfig
from pretrain.objectives.image_text import tokenizer
from pretrain.train_module import PretrainModule, TrainModule
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
        dataset, url = build_view_dataset(config.corpora, config), spec.resolve(config.out)
        module = build_module(config)
        if config.init_from:
            init_from_checkpoint(Checkpoint.open(config.init_from), module)
        build, described = (lambda: build_module(config)), [CheckpointDescription.from_config(config)]
        trained = train(TrainJob("pretrain", config, described, dataset, build, directory, url, spec, probe), module)
        if rank_and_world_size()[0] == 0:
            artifact.write(trained.weights, described[0], directory)
        return training_metrics(trained, dataset, "student.")

    spec = checkpoint_spec(config)
    return get_or_create_on_all_ranks(spec, config, write)


def train(job: TrainJob, module: TrainModule) -> TrainResult:
    """Train a learner to the end.

    Raises:
        UserError: the settings ask for a probe that is not there, or the training goes wrong.
    """
    settings = job.settings
    if settings.collapse.probe is not None and job.probe is None:
        raise UserError("collapse.probe: needs a probe function; use `fovea pretrain`, or pass one to pretrain.run")
    module.precision = settings.sharding.precision
    execution = Execution(settings.runtime.activation_checkpointing, settings.runtime.compile)
    module.set_execution(execution)
    for branch in module.branches():
        backend = getattr(branch.student.config, "attention", "timm's")
        _log.info("%sattention: %s; blocks: %s", branch.prefix, backend, execution)
    return Trainer(job, module).run()


def get_or_create_on_all_ranks(
    spec: ArtifactSpec, output: Output, write: Callable[[Path], Mapping[str, Any]]
) -> Artifact:
    """`get_or_create` on all ranks of a training: every rank trains, the first one commits."""
    url = spec.resolve(output.out)
    if rank_and_world_size()[0] == 0 or find(url) is not None:
        get_or_create(spec, output.out, write, RESUME_FROM, output.restart)
    else:
        write(staging_dir(spec, output.out))
    if rank_and_world_size()[0] == 0:
        remove_remote(url)
    barrier()
    return open_artifact(url, "checkpoint")


Tokenize = Callable[[Sequence[str]], Tensor]


def build_view_dataset(corpora: Sequence[str], settings: PretrainSettings) -> ViewDataset:
    """Views of the samples of some corpora or selections, as a pretraining's objectives read them."""
    texts = [each.text for each in settings.objectives if isinstance(each, ClipConfig | SiglipConfig)]
    tokenize = tokenizer(texts[0]) if texts else None
    return build_dataset(corpora, settings, settings.views, settings.model.patch_size, tokenize)


def build_dataset(
    corpora: Sequence[str],
    settings: TrainingSettings,
    views: Views,
    patch_size: int,
    tokenize: Tokenize | None = None,
    labeled: bool = False,
    repeats: int = 0,
) -> ViewDataset:
    """Views of the samples of some corpora or selections.

    Args:
        patch_size: of the patch tokens that masks cover.
        tokenize: captions to token ids, where an objective reads them; then every sample must have one.
        labeled: an objective reads classes; then every sample must have one.
        repeats: views of a sample after which the first one comes again; 0: none does.
    """
    samples = Samples([CorpusPart.open(url) for url in corpora])
    _attach_cache(samples, settings)
    if tokenize is not None:
        for part in samples.parts:
            _ = part.corpus.captions  # raises now, not in a worker, if one is missing
    if labeled:
        for part in samples.parts:
            _ = part.corpus.labels
    masks = MaskSettings.from_config(views, patch_size)
    return ViewDataset(samples, views, masks, settings.schedule.seed, settings.sampling, tokenize, labeled, repeats)


def _attach_cache(samples: Samples, settings: TrainingSettings) -> None:
    """Keep parts of shards on the local disk, where that saves reading them again."""
    max_bytes = int(settings.runtime.cache_gb * 1e9)
    whole = sum(part.corpus.total_bytes for part in samples.parts)
    if max_bytes == 0:
        return
    if settings.sampling.shuffle == "global" and whole > max_bytes:
        _log.warning("cache_gb: %.1f GB of shards do not fit, so images are read one by one, uncached", whole / 1e9)
        return
    cache = BlockCache(cache_directory() / "blocks", max_bytes)
    for part in samples.parts:
        part.corpus.cache = cache


def build_module(settings: PretrainSettings) -> PretrainModule:
    """Student, teacher and heads with the initial weights of the settings' seed; the teacher starts as the student."""
    torch.manual_seed(settings.schedule.seed)
    student = VisionTransformer(settings.model)
    teacher = VisionTransformer(settings.model.model_copy(update={"drop_path_rate": 0.0}))
    teacher.load_state_dict(student.state_dict())
    torch.manual_seed(settings.schedule.seed + 1)
    losses = build_objectives(settings.objectives, settings.model, settings.model)
    return PretrainModule(student, teacher, losses, settings.views)


def training_metrics(result: TrainResult, dataset: ViewDataset, student: str) -> dict[str, Any]:
    """Metrics of a checkpoint.

    Args:
        student: what the names of its student's weights begin with.
    """
    last = next((row for row in reversed(result.metrics) if metrics_log.SKIPPED not in row), {})
    return {
        "images": dataset.samples.size,
        "bad_samples": result.bad_samples,
        "skipped_steps": result.train_state.skipped_steps,
        "rollbacks": result.train_state.rollbacks,
        "steps": len(result.metrics),
        "images_seen": result.train_state.samples,
        "parameters": sum(value.numel() for name, value in result.weights.items() if name.startswith(student)),
        "loss": metrics_log.select_losses(last),
        "images_per_second": round(result.images_per_second, 1),
        **{name: round(result.speed[name], 3) for name in ("mfu", "memory_gb") if name in result.speed},
        **result.compute,
        "resumed_at": result.resumed_at,
    }
