"""The stages of a pipeline in order, each reading and writing artifacts, whoever makes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from distill.config import DistillConfig, PublishConfig
from distill.train.specs import student_urls
from eval.config import EvaluateConfig, ReportConfig
from flows import curation_stages, summary
from flows.config import CheckpointEvalConfig, PipelineConfig
from flows.incremental_state import record_training
from flows.orchestration.pipeline_run import ArtifactMissingError, PipelineRun, find_only
from infra.artifacts.artifact import open_artifact
from infra.notices import print_notice
from infra.storage import filesystem
from pretrain.backbones.config import CheckpointBackboneConfig
from pretrain.checkpoint.spec import checkpoint_spec
from pretrain.config import PretrainConfig

CheckpointEvaluator = Callable[[CheckpointEvalConfig, PretrainConfig, str | None], AbstractContextManager[list[str]]]
"""Scores the teachers of a pretraining while it goes on; the list then holds the URL of their comparison."""


def run_stages(run: PipelineRun, evaluator: CheckpointEvaluator | None = None) -> dict[str, Any]:
    """Ingest, embed, deduplicate, retrieve, pretrain, evaluate, distill, evaluate, publish, report.

    Args:
        evaluator: what `checkpoint_eval` of the configuration is carried out by.

    Returns:
        The summary that is also written to `summary.json` below the root.
    """
    config = run.config
    sources, truth = curation_stages.ingest_sources(config)
    corpora = curation_stages.ingest(run, sources)
    selection = curation_stages.curate(run, corpora)
    curated = curation_stages.materialize(run, corpora, selection)
    record_training(config.root, selection)
    training = [curated, *([corpora["seed"]] if "seed" in corpora else [])]
    leaks = curation_stages.find_leaks(run, corpora, training)
    teacher = _pretrain(run, corpora, training, leaks, evaluator)
    _evaluate(run, "evaluate-teacher", teacher, corpora, leaks)
    students = _distill(run, teacher, training)
    for name, student in students.items():
        _evaluate(run, f"evaluate-{name}", student, corpora, leaks)
        _publish(run, name, student, corpora)
    facts = summary.curation_scores(config, run.urls, truth)
    _report(run, facts)
    return summary.write(config, run.urls, run.seconds, facts)


def find_finished(config: PipelineConfig) -> dict[str, Any] | None:
    """The summary of a pipeline all of whose artifacts exist; None where something is still to be made."""
    if not filesystem.is_folder(config.root):
        return None
    run = PipelineRun(config, find_only)
    try:
        return run_stages(run)
    except ArtifactMissingError:
        if run.urls:
            print_notice(
                f"run: {len(run.urls)} artifacts exist below {config.root}; resuming after {list(run.urls)[-1]}"
            )
        return None


def _pretrain(
    run: PipelineRun,
    corpora: dict[str, str],
    training: list[str],
    leaks: dict[str, str],
    evaluator: CheckpointEvaluator | None,
) -> str:
    """URL of the teacher, whose states are scored while it is trained, if that is asked for."""
    config, settings = pretrain_config(run, training), run.config.checkpoint_eval
    if settings is None:
        return run.run("pretrain", config)
    if evaluator is None:  # the comparison is not known by its settings alone
        raise ArtifactMissingError
    shared = {name: value for name, value in dict(settings).items() if name != "deployment"}
    eval_config = CheckpointEvalConfig(
        **shared,
        training=checkpoint_spec(config).resolve(config.out),
        datasets=_datasets(run, corpora),
        leaks=leaks,
        out=filesystem.join(run.config.root, "checkpoint-eval"),
    )
    with evaluator(eval_config, config, settings.deployment) as comparison:
        teacher = run.run("pretrain", config)
    if comparison:
        run.stage_finished("teachers", comparison[0])
    return teacher


def pretrain_config(run: PipelineRun, corpora: list[str]) -> PretrainConfig:
    return PretrainConfig(**dict(run.config.pretrain), corpora=corpora, out=run.out("pretrain"))


def _distill(run: PipelineRun, teacher: str, corpora: list[str]) -> dict[str, str]:
    """Checkpoints of the students by name."""
    settings = dict(run.config.distill)
    config = DistillConfig(**settings, teacher_checkpoint=teacher, corpora=corpora, out=run.out("distill"))
    url = run.run("distill", config)
    return student_urls(open_artifact(url, "checkpoint"), list(config.students))


def _datasets(run: PipelineRun, corpora: dict[str, str]) -> dict[str, str]:
    """Corpora of the datasets that tasks may name."""
    return {name: corpora[name] for name in ("train", "test", *run.config.eval_dataset_names())}


def _evaluate(run: PipelineRun, stage: str, checkpoint: str, corpora: dict[str, str], leaks: dict[str, str]) -> None:
    config = EvaluateConfig(
        **dict(run.config.evaluate),
        model=CheckpointBackboneConfig(url=checkpoint),
        datasets=_datasets(run, corpora),
        leaks=leaks,
        features=filesystem.join(run.config.root, "features"),
        out=run.out(stage),
    )
    run.run(stage, config)


def _publish(run: PipelineRun, student: str, checkpoint: str, corpora: dict[str, str]) -> None:
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
    run.run(f"publish-{student}", config)


def _report(run: PipelineRun, facts: dict[str, dict[str, float]]) -> None:
    settings = dict(run.config.report) | {"title": run.config.name}
    artifacts = dict(run.urls)
    config = ReportConfig(**settings, artifacts=artifacts, facts=facts, out=run.out("report"))
    run.run("report", config)
