"""The distillation stage: frozen teachers and corpora to a checkpoint for each student, by pretraining's engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill import taught
from distill.config import DistillConfig
from distill.lesson import Lesson
from distill.objectives.clip import towers
from distill.objectives.config import ClipLogitsConfig, DeitConfig, FeaturesConfig
from distill.specs import checkpoint_spec, require_students, student_spec, student_url
from distill.taught import Kept
from infra.artifacts import Artifact, ArtifactSpec, open_artifact, produce
from infra.corpora import Corpus
from infra.errors import UserError
from infra.storage import join, parent
from pretrain import checkpoints, ranks
from pretrain.checkpoints import STUDENTS, Description
from pretrain.data.loader import Batch, ViewDataset
from pretrain.data.samples import Part
from pretrain.learner import Learner
from pretrain.learner import Part as LearnerPart
from pretrain.objectives.image_text import tokenizer
from pretrain.ranks import barrier, device_of_rank, world
from pretrain.reporting import Task
from pretrain.train import dataset_of, produce_together, train, training_metrics
from pretrain.trainer import TrainResult

_BATCH = 32  # images that teachers see at a time before the training


def distill(config: DistillConfig) -> Artifact:
    """Train students on what frozen teachers say; return the checkpoint artifact.

    With several students the metrics of that one tell the URLs of theirs.

    Raises:
        UserError: a teacher or a corpus is missing, or students and teachers do not fit.
    """

    def write(directory: Path) -> Mapping[str, Any]:
        if world()[1] > 1:  # before teachers are loaded: each rank onto its own GPU
            ranks.join(device_of_rank())
        lesson = Lesson.of(config, _classes(config))
        dataset, url = _dataset(lesson), planned.resolve(config.out)
        described = [_description(lesson, name) for name in config.students]
        build = _uncounted if config.cached_views or lesson.headless else lesson.build
        task = Task("distill", config, described, dataset, build, directory, url, planned)
        learner = lesson.build(_kept(lesson, dataset, planned, url) if config.cached_views else None)
        learner.to(device_of_rank())
        learner.standardise(_first_batches(lesson, dataset))
        trained = train(task, learner)
        parts = dict(zip(config.students, learner.parts(), strict=True))
        names = list(parts)
        if len(names) == 1:
            if world()[0] == 0:
                checkpoints.write(_weights(trained, parts[names[0]]), described[0], directory)
            return training_metrics(trained, dataset, parts[names[0]].prefix + "student.")
        if world()[0] == 0:
            for name, description in zip(names, described, strict=True):
                _write_student(name, parts[name], description, trained, dataset, planned, url)
        urls = {name: student_url(url, name) for name in names}
        return training_metrics(trained, dataset, "students.") | {STUDENTS: urls}

    planned = checkpoint_spec(config)
    require_students(planned, config)
    return produce_together(planned, config, write)


def _uncounted() -> Learner:
    raise UserError("the work of teachers without heads, or that are not asked, is not counted")


def _write_student(
    name: str,
    part: LearnerPart,
    description: Description,
    trained: TrainResult,
    dataset: ViewDataset,
    planned: ArtifactSpec,
    url: str,
) -> None:
    def write(directory: Path) -> Mapping[str, Any]:
        checkpoints.write(_weights(trained, part), description, directory)
        return training_metrics(trained, dataset, part.prefix + "student.")

    produce(student_spec(planned, name), student_url(url, name), write)


def _weights(trained: TrainResult, part: LearnerPart) -> dict[str, Tensor]:
    """What of the learner is a student's own and can be used again: both backbones, CLIP's towers."""
    return {
        after + key.removeprefix(part.prefix + before): value
        for before, after in ({"student.": "student."} | dict(part.kept)).items()
        for key, value in trained.weights.items()
        if key.startswith(part.prefix + before)
    }


def _description(lesson: Lesson, name: str) -> Description:
    clip = lesson.asked(ClipLogitsConfig)
    return Description(
        released="average",
        model=lesson.network(name),
        views=lesson.views,
        seed=lesson.config.schedule.seed,
        objectives=[towers(clip)] if clip else [],
    )


def _dataset(lesson: Lesson) -> ViewDataset:
    clip, views = lesson.asked(ClipLogitsConfig), lesson.views
    if not lesson.inherited:
        views = views.model_copy(update={"num_local_crops": 0})  # nobody else reads them
    tokenize = tokenizer(clip.text) if clip else None
    labelled = lesson.asked(DeitConfig) is not None
    repeats = lesson.config.cached_views
    return dataset_of(lesson.config.corpora, lesson.config, views, lesson.patch_size, tokenize, labelled, repeats)


def _kept(lesson: Lesson, dataset: ViewDataset, planned: ArtifactSpec, url: str) -> Kept:
    """What teachers say of all views, by the first rank, unless an earlier distillation has kept it."""
    deit = lesson.asked(DeitConfig)
    settings = {
        "views": dataset.views.model_dump(mode="json"),
        "seed": dataset.seed,
        "classifier": deit.classifier if deit else None,
        **{name: planned.settings[name] for name in ("teachers", "cached_views")},
    }
    inputs = {name: each for name, each in planned.inputs.items() if not name.startswith("start_")}
    plan = ArtifactSpec("embeddings", "teach", taught.VERSION, settings, inputs)
    out = join(lesson.config.taught or join(parent(url), "taught"), "{id}")
    if world()[0] == 0:
        taught.keep(plan, out, dataset, lambda: lesson.build().to(device_of_rank()).teach)
    barrier()
    return Kept(open_artifact(plan.resolve(out), "embeddings"))


def _first_batches(lesson: Lesson, dataset: ViewDataset) -> Iterator[Batch]:
    """What teachers' features are standardised by: the same on all ranks."""
    features = lesson.asked(FeaturesConfig)
    images = features.standardise if features else 0
    for first in range(0, images, _BATCH):
        yield dataset.batch(np.arange(first, min(first + _BATCH, images)))


def _classes(config: DistillConfig) -> list[str]:
    """Names of the corpora's classes, where an objective reads them.

    Raises:
        UserError: they have none, or not the same.
    """
    if not any(isinstance(each, DeitConfig) for each in config.objectives):
        return []
    corpora: list[Corpus] = [Part.open(url).corpus for url in config.corpora]
    classes = corpora[0].classes
    for corpus in corpora:
        if not corpus.classes or corpus.classes != classes:
            raise UserError(f"{corpus.artifact.url}: objective deit needs the same classes in all corpora")
    return classes
