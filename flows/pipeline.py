"""The whole pipeline: the stages' flows in order, each reading and writing artifacts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow

from curation.config import CurateConfig, EmbedConfig, EmbedSettings, IngestConfig, MaterializeConfig
from curation.steps.config import Decontaminate
from distill.config import DistillConfig, PublishConfig
from eval.config import EvaluateConfig, ReportConfig
from flows import stages, summary
from flows.config import FollowConfig, PipelineConfig, Sources
from flows.following import following
from infra import storage
from infra.artifacts import cache_directory, open_artifact
from infra.errors import UserError
from pretrain.config import CheckpointBackbone, PretrainConfig


@dataclass
class Run:
    """A run of a pipeline: where its artifacts go, and which it has so far."""

    config: PipelineConfig
    urls: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def out(self, stage: str) -> str:
        """Where a stage writes: below the root, by stage and id."""
        return storage.join(self.config.root, stage, "{id}")

    def done(self, stage: str, url: str) -> str:
        """Note a finished stage; return its artifact's URL."""
        now = time.monotonic()
        self.urls[stage], self.seconds[stage], self._last = url, round(now - self._last, 1), now
        return url


@flow(name="fovea-pipeline")
def pipeline(config: PipelineConfig) -> dict[str, Any]:
    """Ingest, embed, deduplicate, retrieve, pretrain, evaluate, distill, evaluate, publish, report.

    Returns:
        The summary that is also written to `summary.json` below the root.
    """
    run = Run(config)
    sources, truth = _sources(config)
    corpora = _ingest(run, sources)
    curated = _curate(run, corpora)
    training = [curated, *([corpora["seed"]] if "seed" in corpora else [])]
    leaks = _leaks(run, corpora, training)
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


def _sources(config: PipelineConfig) -> tuple[Sources, Path | None]:
    """Where the images are, and the file with the truth about them, where there is one."""
    if config.sources is not None:
        return config.sources, None
    from curation.embedded import TRUTH, generate

    assert config.embedded is not None
    if not storage.is_local(config.root):
        raise UserError(f"root: {config.root}, but the embedded corpus is made on this machine; give a local root")
    folder = generate(config.embedded, storage.local_path(config.root) / "embedded")
    seed = str(folder / "seed")
    return Sources(pool=str(folder / "pool"), test=str(folder / "test"), train=seed, seed=seed), folder / TRUTH


def _ingest(run: Run, sources: Sources) -> dict[str, str]:
    """Corpora by role; one source in two roles is one corpus."""
    corpora: dict[str, str] = {}
    ingested: dict[str, str] = {}
    named = sources.model_dump(exclude_none=True)
    for role, source in (named | named.pop("evaluation")).items():
        if source not in ingested:
            settings = IngestConfig(**dict(run.config.ingest), source=source, out=run.out("ingest"))
            ingested[source] = run.done(f"ingest-{role}", stages.ingest(settings))
        corpora[role] = ingested[source]
    return corpora


def _embed(run: Run, stage: str, settings: EmbedSettings, corpus: str, previous: str | None = None) -> str:
    if stage in run.urls:
        return run.urls[stage]
    config = EmbedConfig(**dict(settings), corpus=corpus, previous=previous, out=run.out("embed"))
    return run.done(stage, stages.embed(config))


def _curate(run: Run, corpora: dict[str, str]) -> str:
    """The corpus of what the curation steps leave of the pool."""
    config = run.config
    selection = run.done(
        "deduplicate",
        stages.curate(
            CurateConfig(
                **dict(config.deduplicate),
                corpus=corpora["pool"],
                embeddings=_embed(run, "embed-pool-copies", config.copies, corpora["pool"]),
                evaluation=[_embed(run, "embed-test-copies", config.copies, corpora["test"])],
                out=run.out("deduplicate"),
            )
        ),
    )
    if "seed" in corpora:
        selection = run.done(
            "retrieve",
            stages.curate(
                CurateConfig(
                    **dict(config.retrieve),
                    corpus=corpora["pool"],
                    embeddings=_embed(run, "embed-pool-likeness", config.likeness, corpora["pool"]),
                    curated=_embed(run, "embed-seed-likeness", config.likeness, corpora["seed"]),
                    selection=selection,
                    out=run.out("retrieve"),
                )
            ),
        )
    settings = MaterializeConfig(
        corpus=corpora["pool"], selection=selection, shard_mb=config.ingest.shard_mb, out=run.out("materialize")
    )
    return run.done("materialize", stages.materialize(settings))


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


def _leaks(run: Run, corpora: dict[str, str], training: list[str]) -> dict[str, str]:
    """Selections over the evaluation sets: what they drop is a near-duplicate of something that is trained on.

    Near is what the decontamination of the pool takes for it; where there is none, nothing is looked for.
    """
    steps = [each for each in run.config.deduplicate.steps if isinstance(each, Decontaminate)]
    if not steps:
        return {}
    step = steps[0].model_copy(update={"drop": "hits", "count_components": False})
    before = run.urls["embed-pool-copies"]
    seen = [
        _embed(run, f"embed-training-copies-{i}", run.config.copies, url, before if i == 0 else None)
        for i, url in enumerate(training)
    ]
    found = {}
    for name in ("test", *run.config.evaluation_sets()):
        embedded = _embed(run, f"embed-{name}-copies", run.config.copies, corpora[name])
        config = CurateConfig(
            corpus=corpora[name], embeddings=embedded, evaluation=seen, steps=[step], out=run.out("leaks")
        )
        found[name] = run.done(f"leaks-{name}", stages.curate(config))
    return found


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
