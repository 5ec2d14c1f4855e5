"""The distillation stage: frozen teachers and corpora to a checkpoint for each student, by pretraining's engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from distill import taught
from distill.config import DistillConfig
from distill.lesson import Lesson
from distill.objectives.clip import towers
from distill.objectives.config import ClipLogitsConfig, DeitConfig, FeaturesConfig
from distill.taught import Kept
from infra.artifacts import Artifact, Input, Plan, find, find_planned, open_artifact, produce
from infra.corpora import Corpus
from infra.errors import UserError
from infra.hashing import hash_file
from infra.storage import join, parent
from pretrain import backbones, checkpoints, ranks
from pretrain.checkpoints import STUDENTS, Description
from pretrain.config import decisive
from pretrain.data.loader import Batch, ViewDataset
from pretrain.data.samples import Part
from pretrain.engine import Trained
from pretrain.learner import Learner
from pretrain.learner import Part as LearnerPart
from pretrain.objectives.image_text import tokenizer
from pretrain.ranks import barrier, device_of_rank, world
from pretrain.reporting import Task
from pretrain.train import corpus_inputs, dataset_of, produce_together, train, training_metrics

VERSION = 5
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

    planned = plan(config)
    _require_students(planned, config)
    return produce_together(planned, config, write)


def _require_students(planned: Plan, config: DistillConfig) -> None:
    """Look at several students' places before the training.

    Raises:
        UserError: one is taken by another checkpoint, or is gone while what all were trained in is there.
    """
    if len(config.students) == 1:
        return
    url = planned.resolve(config.out)
    gone = [name for name in config.students if find_planned(_own_plan(planned, name), student_url(url, name)) is None]
    if gone and find(url) is not None:
        raise UserError(f"{student_url(url, gone[0])}: the student is gone; remove {url} too and run again")


def _uncounted() -> Learner:
    raise UserError("the work of teachers without heads, or that are not asked, is not counted")


def student_url(url: str, name: str) -> str:
    """Where the checkpoint of one of several students is, given the URL of what was distilled."""
    return f"{url.rstrip('/')}-{name}"


def student_urls(artifact: Artifact, names: Sequence[str]) -> dict[str, str]:
    """URLs of the students' checkpoints of a distillation: one of a single student is that student's."""
    if len(names) == 1:
        return {names[0]: artifact.url}
    return {name: student_url(artifact.url, name) for name in names}


def _own_plan(planned: Plan, name: str) -> Plan:
    """What one of several students hangs on: not its company."""
    settings = {**planned.settings, "students": {name: planned.settings["students"][name]}}
    inputs = {role: each for role, each in planned.inputs.items() if not role.startswith("start_")}
    start = planned.inputs.get(f"start_{name}")
    return Plan("checkpoint", "distill", VERSION, settings, inputs | ({f"start_{name}": start} if start else {}))


def _write_student(
    name: str,
    part: LearnerPart,
    description: Description,
    trained: Trained,
    dataset: ViewDataset,
    planned: Plan,
    url: str,
) -> None:
    def write(directory: Path) -> Mapping[str, Any]:
        checkpoints.write(_weights(trained, part), description, directory)
        return training_metrics(trained, dataset, part.prefix + "student.")

    produce(_own_plan(planned, name), student_url(url, name), write)


def _weights(trained: Trained, part: LearnerPart) -> dict[str, Tensor]:
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
        model=lesson.config.students[name].network,
        views=lesson.views,
        seed=lesson.config.schedule.seed,
        objectives=[towers(clip)] if clip else [],
    )


def _dataset(lesson: Lesson) -> ViewDataset:
    clip, views = lesson.asked(ClipLogitsConfig), lesson.views
    if not lesson.inherited:
        views = views.model_copy(update={"local_count": 0})  # nobody else reads them
    tokenize = tokenizer(clip.text) if clip else None
    labelled = lesson.asked(DeitConfig) is not None
    repeats = lesson.config.cached_views
    return dataset_of(lesson.config.corpora, lesson.config, views, lesson.patch_size, tokenize, labelled, repeats)


def _kept(lesson: Lesson, dataset: ViewDataset, planned: Plan, url: str) -> Kept:
    """What teachers say of all views, by the first rank, unless an earlier distillation has kept it."""
    deit = lesson.asked(DeitConfig)
    settings = {
        "views": dataset.views.model_dump(mode="json"),
        "seed": dataset.seed,
        "classifier": deit.classifier if deit else None,
        **{name: planned.settings[name] for name in ("teachers", "cached_views")},
    }
    inputs = {name: each for name, each in planned.inputs.items() if not name.startswith("start_")}
    plan = Plan("embeddings", "teach", taught.VERSION, settings, inputs)
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


def plan(config: DistillConfig) -> Plan:
    """The checkpoint that a configuration asks for."""
    settings, inputs = decisive(config), corpus_inputs(config.corpora)
    if config.teacher_checkpoint is not None:
        inputs["teacher"] = open_artifact(config.teacher_checkpoint, "checkpoint").as_input()
    known = {name: backbones.identity(each) for name, each in config.teachers.items()}
    settings["teachers"] = {name: told for name, (told, _) in known.items()}
    inputs |= {f"teacher_{name}_{key}": each for name, (_, found) in known.items() for key, each in found.items()}
    settings["students"] = {
        name: each.model_dump(mode="json", exclude={"start"}) for name, each in config.students.items()
    }
    for name, student in config.students.items():
        if student.start is not None:
            inputs[f"start_{name}"] = open_artifact(student.start, "checkpoint").as_input()
    settings["objectives"] = [each.model_dump(mode="json", exclude={"checkpoint"}) for each in config.objectives]
    for each in config.objectives:
        if isinstance(each, DeitConfig):
            if not Path(each.checkpoint).is_file():
                raise UserError(f"{each.checkpoint}: no such file; give the path of the classifier's weights")
            inputs["classifier"] = Input(id=hash_file(Path(each.checkpoint)), url=each.checkpoint)
    return Plan("checkpoint", "distill", VERSION, settings, inputs)
