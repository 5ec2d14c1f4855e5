"""The whole pipeline: the stages' flows in order, each reading and writing artifacts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import flow

from distill.config import DistillConfig, PublishConfig
from eval.config import EvaluateConfig, ReportConfig
from flows import curating, stages, summary
from flows.config import FollowConfig, PipelineConfig
from flows.following import following
from flows.growing import note_training
from flows.running import Run
from infra import storage
from infra.artifacts import cache_directory, open_artifact
from pretrain.config import CheckpointBackbone, PretrainConfig


@flow(name="fovea-pipeline")
def pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Ingest, embed, deduplicate, retrieve, pretrain, evaluate, distill, evaluate, publish, report.

    Returns:
        The summary that is also written to `summary.json` below the root.
    """
    run = Run(config)
    sources, truth = curating.sources(config)
    corpora = curating.ingest(run, sources)
    selection = curating.curate(run, corpora)
    curated = curating.materialize(run, corpora, selection)
    note_training(config.root, selection)
    training = [curated, *([corpora["seed"]] if "seed" in corpora else [])]
    leaks = curating.leaks(run, corpora, training)
    with _following(run, corpora, training, leaks):
        teacher = run.done("pretrain", stages.pretrain(_pretrain_config(run, training)))
    _evaluate(run, "evaluate-teacher", teacher, corpora, leaks)
    students = _distill(run, teacher, training)
    for name, student in students.items():
        _evaluate(run, f"evaluate-{name}", student, corpora, leaks)
        _publish(run, name, student, corpora)
    facts = summary.curation_scores(config, run.urls, truth)
    _report(run, facts)
    return summary.write(config, run.urls, run.seconds, facts)


def _pretrain_config(run: Run, corpora: list[str]) -> PretrainConfig:
    return PretrainConfig(**dict(run.config.pretrain), corpora=corpora, out=run.out("pretrain"))


@contextmanager
def _following(run: Run, corpora: dict[str, str], training: list[str], leaks: dict[str, str]) -> Iterator[None]:
    """Score the teachers of the pretraining while it goes on, if that is asked for."""
    settings = run.config.follow
    if settings is None:
        yield
        return
    from pretrain.train import plan

    config = _pretrain_config(run, training)
    planned = plan(config)
    shared = {name: value for name, value in dict(settings).items() if name != "deployment"}
    follow = FollowConfig(
        **shared,
        training=planned.resolve(config.out),
        datasets=_datasets(run, corpora),
        leaks=leaks,
        out=storage.join(run.config.root, "follow"),
    )
    folder = cache_directory() / "follow" / planned.id
    with following(follow, folder, settings.deployment) as comparison:
        yield
    if comparison:
        run.done("teachers", comparison[0])


def _distill(run: Run, teacher: str, corpora: list[str]) -> dict[str, str]:
    """Checkpoints of the students by name."""
    from distill.distill import student_urls

    settings = dict(run.config.distill)
    config = DistillConfig(**settings, teacher_checkpoint=teacher, corpora=corpora, out=run.out("distill"))
    url = run.done("distill", stages.distill(config))
    return student_urls(open_artifact(url, "checkpoint"), list(config.students))


def _datasets(run: Run, corpora: dict[str, str]) -> dict[str, str]:
    """Corpora of the datasets that tasks may name."""
    return {name: corpora[name] for name in ("train", "test", *run.config.evaluation_sets())}


def _evaluate(run: Run, stage: str, checkpoint: str, corpora: dict[str, str], leaks: dict[str, str]) -> None:
    config = EvaluateConfig(
        **dict(run.config.evaluate),
        model=CheckpointBackbone(url=checkpoint),
        datasets=_datasets(run, corpora),
        leaks=leaks,
        features=storage.join(run.config.root, "features"),
        out=run.out(stage),
    )
    run.done(stage, stages.evaluate(config))


def _publish(run: Run, student: str, checkpoint: str, corpora: dict[str, str]) -> None:
    """One of several students is published by its own name behind that of the family."""
    settings = dict(run.config.publish)
    if len(run.config.distill.students) > 1:
        settings["name"] = f"{settings['name']}-{student}"
    config = PublishConfig(
        **settings,
        checkpoint=checkpoint,
        images=corpora["test"],
        reports=[run.urls[f"evaluate-{student}"]],
        out=run.out("publish"),
    )
    run.done(f"publish-{student}", stages.publish(config))


def _report(run: Run, facts: dict[str, dict[str, float]]) -> None:
    settings = dict(run.config.report) | {"title": run.config.name}
    artifacts = dict(run.urls)
    config = ReportConfig(**settings, artifacts=artifacts, facts=facts, out=run.out("report"))
    run.done("report", stages.report(config))
