"""The distillation stage: frozen teachers and corpora to a checkpoint for each student, by pretraining's engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill.config import DistillConfig
from distill.objectives.clip_distill import build_towers
from distill.objectives.config import ClipDistillConfig, DeitConfig, FeaturesConfig
from distill.train import teacher_cache
from distill.train.build import DistillationSetup
from distill.train.specs import checkpoint_spec, require_students, student_spec, student_url
from distill.train.teacher_cache import TeacherCache
from infra.artifacts.artifact import Artifact, ArtifactSpec, get_or_create, open_artifact
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from infra.storage.filesystem import join, parent
from pretrain import distributed
from pretrain.checkpoint import artifact
from pretrain.checkpoint.artifact import STUDENTS, CheckpointDescription
from pretrain.data.loader import Batch, ViewDataset
from pretrain.data.samples import CorpusPart
from pretrain.distributed import barrier, device_of_rank, rank_and_world_size
from pretrain.monitoring.reporter import TrainJob
from pretrain.objectives.image_text import tokenizer
from pretrain.train import build_dataset, get_or_create_on_all_ranks, train, training_metrics
from pretrain.train_module import StudentBranch as LearnerPart
from pretrain.train_module import TrainModule
from pretrain.trainer import TrainResult

_BATCH = 32  # images that teachers see at a time before the training


def distill(config: DistillConfig) -> Artifact:
    """Train students on what frozen teachers say; return the checkpoint artifact.

    With several students the metrics of that one tell the URLs of theirs.

    Raises:
        UserError: a teacher or a corpus is missing, or students and teachers do not fit.
    """

    def write(directory: Path) -> Mapping[str, Any]:
        if rank_and_world_size()[1] > 1:  # before teachers are loaded: each rank onto its own GPU
            distributed.init_process_group(device_of_rank())
        setup = DistillationSetup.from_config(config, _classes(config))
        dataset, url = _build_dataset(setup), spec.resolve(config.out)
        described = [_describe(setup, name) for name in config.students]
        build = _uncounted_settings if config.num_cached_views or setup.has_headless_teachers else setup.build_module
        task = TrainJob("distill", config, described, dataset, build, directory, url, spec)
        learner = setup.build_module(
            _open_teacher_cache(setup, dataset, spec, url) if config.num_cached_views else None
        )
        learner.to(device_of_rank())
        learner.fit_standardization(_first_batches(setup, dataset))
        trained = train(task, learner)
        parts = dict(zip(config.students, learner.branches(), strict=True))
        names = list(parts)
        if len(names) == 1:
            if rank_and_world_size()[0] == 0:
                artifact.write(_select_weights(trained, parts[names[0]]), described[0], directory)
            return training_metrics(trained, dataset, parts[names[0]].prefix + "student.")
        if rank_and_world_size()[0] == 0:
            for name, description in zip(names, described, strict=True):
                _write_student(name, parts[name], description, trained, dataset, spec, url)
        urls = {name: student_url(url, name) for name in names}
        return training_metrics(trained, dataset, "students.") | {STUDENTS: urls}

    spec = checkpoint_spec(config)
    require_students(spec, config)
    return get_or_create_on_all_ranks(spec, config, write)


def _uncounted_settings() -> TrainModule:
    raise UserError("FLOPs of teachers without heads and of cached teachers are not counted")


def _write_student(
    name: str,
    branch: LearnerPart,
    description: CheckpointDescription,
    result: TrainResult,
    dataset: ViewDataset,
    spec: ArtifactSpec,
    url: str,
) -> None:
    def write(directory: Path) -> Mapping[str, Any]:
        artifact.write(_select_weights(result, branch), description, directory)
        return training_metrics(result, dataset, branch.prefix + "student.")

    get_or_create(student_spec(spec, name), student_url(url, name), write)


def _select_weights(result: TrainResult, branch: LearnerPart) -> dict[str, Tensor]:
    """What of the learner is a student's own and can be used again: both backbones, CLIP's towers."""
    return {
        after + key.removeprefix(branch.prefix + before): value
        for before, after in ({"student.": "student."} | dict(branch.saved_prefixes)).items()
        for key, value in result.weights.items()
        if key.startswith(branch.prefix + before)
    }


def _describe(setup: DistillationSetup, name: str) -> CheckpointDescription:
    clip = setup.find_objective(ClipDistillConfig)
    return CheckpointDescription(
        released="average",
        model=setup.network(name),
        views=setup.views,
        seed=setup.config.schedule.seed,
        objectives=[build_towers(clip)] if clip else [],
    )


def _build_dataset(setup: DistillationSetup) -> ViewDataset:
    clip, views = setup.find_objective(ClipDistillConfig), setup.views
    if not setup.teacher_objectives:
        views = views.model_copy(update={"num_local_crops": 0})  # nobody else reads them
    tokenize = tokenizer(clip.text) if clip else None
    labeled = setup.find_objective(DeitConfig) is not None
    repeats = setup.config.num_cached_views
    return build_dataset(setup.config.corpora, setup.config, views, setup.patch_size, tokenize, labeled, repeats)


def _open_teacher_cache(setup: DistillationSetup, dataset: ViewDataset, spec: ArtifactSpec, url: str) -> TeacherCache:
    """What teachers say of all views, by the first rank, unless an earlier distillation has kept it."""
    deit = setup.find_objective(DeitConfig)
    settings = {
        "views": dataset.views.model_dump(mode="json"),
        "seed": dataset.seed,
        "classifier": deit.classifier if deit else None,
        **{name: spec.settings[name] for name in ("teachers", "num_cached_views")},
    }
    inputs = {name: each for name, each in spec.inputs.items() if not name.startswith("start_")}
    plan = ArtifactSpec("embeddings", "teacher_cache", teacher_cache.VERSION, settings, inputs)
    out = join(setup.config.teacher_cache or join(parent(url), "teacher_cache"), "{id}")
    if rank_and_world_size()[0] == 0:
        teacher_cache.get_or_create_cache(
            plan, out, dataset, lambda: setup.build_module().to(device_of_rank()).teacher_features
        )
    barrier()
    return TeacherCache(open_artifact(plan.resolve(out), "embeddings"))


def _first_batches(setup: DistillationSetup, dataset: ViewDataset) -> Iterator[Batch]:
    """What teachers' features are standardized by: the same on all ranks."""
    features = setup.find_objective(FeaturesConfig)
    images = features.standardize_images if features else 0
    for first in range(0, images, _BATCH):
        yield dataset.batch(np.arange(first, min(first + _BATCH, images)))


def _classes(config: DistillConfig) -> list[str]:
    """Names of the corpora's classes, where an objective reads them.

    Raises:
        UserError: they have none, or not the same.
    """
    if not any(isinstance(each, DeitConfig) for each in config.objectives):
        return []
    corpora: list[Corpus] = [CorpusPart.open(url).corpus for url in config.corpora]
    classes = corpora[0].classes
    for corpus in corpora:
        if not corpus.classes or corpus.classes != classes:
            raise UserError(f"{corpus.artifact.url}: objective deit needs the same classes in all corpora")
    return classes
