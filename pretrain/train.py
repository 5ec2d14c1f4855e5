"""The pretraining stage: corpora to a teacher checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.artifacts import Artifact, Input, Plan, cache_directory, find, open_artifact, produce, work_directory
from infra.cache import BlockCache
from infra.errors import UserError
from pretrain import checkpoints, telemetry
from pretrain.checkpoints import Checkpoint, initial_backbone
from pretrain.config import PretrainConfig, PretrainSettings, decisive
from pretrain.data.loader import ViewDataset
from pretrain.data.masks import MaskPlan
from pretrain.data.samples import Part, Samples
from pretrain.engine import Trained, Training
from pretrain.learner import Learner
from pretrain.models.execution import Execution
from pretrain.objectives.build import build as build_objectives
from pretrain.objectives.config import ClipConfig, SiglipConfig
from pretrain.objectives.image_text import tokenizer
from pretrain.ranks import barrier, world
from pretrain.reporting import Probe, Task
from pretrain.saves import remove_remote

VERSION = 4

_log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, probe: Probe | None = None) -> Artifact:
    """Train student and teacher; return the checkpoint artifact.

    Args:
        probe: scores the teacher every `health.probe.every` steps.

    Raises:
        UserError: a corpus is missing or empty, or the loss is no longer finite.
    """

    def write(directory: Path) -> Mapping[str, Any]:
        dataset, url = view_dataset(config.corpora, config), planned.resolve(config.out)
        learner = build_learner(config)
        if config.start:
            Checkpoint.open(config.start).start(learner)
        task = Task("pretrain", config, dataset, lambda: build_learner(config), directory, url, planned, probe)
        return train(task, learner)

    planned = plan(config)
    return produce_together(planned, config.out, write)


def train(task: Task, learner: Learner) -> Mapping[str, Any]:
    """Train a learner to the end, write it into its checkpoint's directory and return the checkpoint's metrics."""
    settings = task.settings
    if settings.health.probe is not None and task.probe is None:
        raise UserError("health.probe: nobody scores here; `fovea pretrain` does, or pass a probe to pretrain.run")
    learner.precision = settings.sharding.precision
    learner.student.execution = Execution(settings.runtime.activation_checkpointing, settings.runtime.compile)
    _log.info("attention: %s; blocks: %s", settings.model.attention, learner.student.execution)
    trained = Training(task, learner).run()
    if world()[0] == 0:
        checkpoints.write(trained.weights, "teacher" if learner.average is None else "average", settings, task.work)
    return training_metrics(trained, task.dataset)


def produce_together(plan: Plan, out: str, write: Callable[[Path], Mapping[str, Any]]) -> Artifact:
    """`produce` on all ranks of a training: every rank trains, the first one commits."""
    url = plan.resolve(out)
    if world()[0] == 0 or find(url) is not None:
        produce(plan, out, write, keep_work=True)
    else:
        write(work_directory(plan, out))
    if world()[0] == 0:
        remove_remote(url)
    barrier()
    return open_artifact(url, "checkpoint")


def plan(config: PretrainConfig) -> Plan:
    """The checkpoint that a configuration asks for."""
    start = {"start": open_artifact(config.start, "checkpoint").as_input()} if config.start else {}
    return Plan("checkpoint", "pretrain", VERSION, decisive(config), corpus_inputs(config.corpora) | start)


def corpus_inputs(urls: Sequence[str]) -> dict[str, Input]:
    return {f"corpus_{i}": open_artifact(url, "corpus", "selection").as_input() for i, url in enumerate(urls)}


def view_dataset(corpora: Sequence[str], settings: PretrainSettings) -> ViewDataset:
    """Views of the samples of some corpora or selections."""
    samples = Samples([Part.open(url) for url in corpora])
    _cache(samples, settings)
    masks = MaskPlan.of(settings.views, settings.model.patch_size)
    tokenize = _tokenizer(settings, samples)
    return ViewDataset(samples, settings.views, masks, settings.schedule.seed, settings.sampling, tokenize)


def _cache(samples: Samples, settings: PretrainSettings) -> None:
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


def _tokenizer(settings: PretrainSettings, samples: Samples) -> Callable[[Sequence[str]], Tensor] | None:
    """The text objectives' tokenizer, where there is one; then every sample must have a caption."""
    for objective in settings.objectives:
        if isinstance(objective, ClipConfig | SiglipConfig):
            for part in samples.parts:
                _ = part.corpus.captions  # raises now, not in a worker, if one is missing
            return tokenizer(objective.text)
    return None


def build_learner(settings: PretrainSettings) -> Learner:
    """Student, teacher and heads with the initial weights of the settings' seed; the teacher starts as the student."""
    student = initial_backbone(settings.model, settings.schedule.seed)
    teacher = initial_backbone(settings.model.model_copy(update={"drop_path": 0.0}), settings.schedule.seed)
    teacher.load_state_dict(student.state_dict())
    torch.manual_seed(settings.schedule.seed + 1)
    losses = build_objectives(settings.objectives, settings.model, settings.model)
    return Learner(student, teacher, losses, settings.views)


def training_metrics(trained: Trained, dataset: ViewDataset) -> dict[str, Any]:
    last = next((row for row in reversed(trained.metrics) if telemetry.SKIPPED not in row), {})
    return {
        "images": dataset.samples.size,
        "unusable": trained.unusable,
        "skipped": trained.tally.skipped,
        "rewinds": trained.tally.rewinds,
        "steps": len(trained.metrics),
        "parameters": sum(value.numel() for name, value in trained.weights.items() if name.startswith("student.")),
        "loss": telemetry.losses(last),
        "images_per_second": round(trained.images_per_second, 1),
        **{name: round(trained.speed[name], 3) for name in ("mfu", "memory_gb") if name in trained.speed},
        "resumed_at": trained.resumed_at,
    }
