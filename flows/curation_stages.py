"""The first half of a pipeline: sources to corpora, and the pool to what is trained on."""

from __future__ import annotations

import json
from pathlib import Path

from curation.config import CurateConfig, EmbedConfig, EmbedSettings, IngestConfig, MaterializeConfig
from curation.steps.config import Decontaminate
from flows.config import PipelineConfig, Sources
from flows.incremental_state import IncrementalState
from flows.orchestration.pipeline_run import PipelineRun
from infra.artifacts.artifact import find
from infra.errors import UserError
from infra.storage import filesystem


def ingest_sources(config: PipelineConfig) -> tuple[Sources, Path | None]:
    """Where the images are, and the file with the truth about them, where there is one."""
    if config.sources is not None:
        return config.sources, None
    from curation.synthetic.corpus import TRUTH, generate

    assert config.synthetic is not None
    if not filesystem.is_local(config.root):
        raise UserError(f"root: {config.root}, but the synthetic corpus is made on this machine; give a local root")
    folder = generate(config.synthetic, filesystem.local_path(config.root) / "synthetic")
    seed = str(folder / "seed")
    return Sources(pool=str(folder / "pool"), test=str(folder / "test"), train=seed, seed=seed), folder / TRUTH


def ingest(run: PipelineRun, sources: Sources) -> dict[str, str]:
    """Corpora by role; one source in two roles is one corpus.

    A run that goes on after a crash keeps those it began with, though its sources may have grown since.
    """
    if run.record is None:
        return _ingest_all(run, sources)
    before = json.loads(filesystem.read_bytes(run.record)) if filesystem.exists(run.record) else {}
    if before and all(find(url) is not None for url in before.values()):
        for role, url in before.items():
            if url not in run.urls.values():
                run.stage_finished(f"ingest-{role}", url)
        return dict(before)
    corpora = _ingest_all(run, sources)
    filesystem.write_atomic(run.record, json.dumps(corpora, indent=2).encode())
    return corpora


def _ingest_all(run: PipelineRun, sources: Sources) -> dict[str, str]:
    corpora: dict[str, str] = {}
    ingested: dict[str, str] = {}
    named = sources.model_dump(exclude_none=True)
    for role, source in (named | named.pop("evaluation")).items():
        if source not in ingested:
            settings = IngestConfig(**dict(run.config.ingest), source=source, out=run.out("ingest"))
            ingested[source] = run.run(f"ingest-{role}", settings)
        corpora[role] = ingested[source]
    return corpora


def curate(run: PipelineRun, corpora: dict[str, str]) -> str:
    """URL of the selection over the pool; of one that grows only what is new is embedded and compared."""
    config = run.config
    grown = IncrementalState.previous_of(config, corpora["pool"])
    evaluation = [_embed(run, "embed-test-dedup", config.dedup_embedding, corpora["test"])]
    deduplicate = CurateConfig(
        **dict(config.deduplicate),
        corpus=corpora["pool"],
        embeddings=_embed(
            run,
            "embed-pool-dedup",
            config.dedup_embedding,
            corpora["pool"],
            grown.previous_selection("embed-pool-dedup"),
        ),
        eval_embeddings=evaluation,
        previous=grown.previous_selection("deduplicate"),
        out=run.out("deduplicate"),
    )
    selection = run.run("deduplicate", deduplicate)
    if "seed" in corpora:
        of_pool, of_seed = "embed-pool-retrieval", "embed-seed-retrieval"
        retrieve = CurateConfig(
            **dict(config.retrieve),
            corpus=corpora["pool"],
            embeddings=_embed(
                run, of_pool, config.retrieval_embedding, corpora["pool"], grown.previous_selection(of_pool)
            ),
            seed_embeddings=_embed(run, of_seed, config.retrieval_embedding, corpora["seed"]),
            selection=selection,
            previous=grown.previous_selection("retrieve"),
            out=run.out("retrieve"),
        )
        selection = run.run("retrieve", retrieve)
    grown.remember(run.urls)
    return selection


def materialize(run: PipelineRun, corpora: dict[str, str], selection: str) -> str:
    """The corpus of what a selection leaves of the pool."""
    settings = MaterializeConfig(
        corpus=corpora["pool"], selection=selection, shard_mb=run.config.ingest.shard_mb, out=run.out("materialize")
    )
    return run.run("materialize", settings)


def find_leaks(run: PipelineRun, corpora: dict[str, str], training: list[str]) -> dict[str, str]:
    """Selections over the evaluation sets: what they drop is a near-duplicate of something that is trained on.

    Near is what the decontamination of the pool takes for it; where there is none, nothing is looked for.
    """
    steps = [each for each in run.config.deduplicate.steps if isinstance(each, Decontaminate)]
    if not steps:
        return {}
    step = steps[0].model_copy(update={"drop": "hits", "count_components": False})
    before = run.urls["embed-pool-dedup"]
    seen = [
        _embed(run, f"embed-training-dedup-{i}", run.config.dedup_embedding, url, before if i == 0 else None)
        for i, url in enumerate(training)
    ]
    found = {}
    for name in ("test", *run.config.eval_dataset_names()):
        embedded = _embed(run, f"embed-{name}-dedup", run.config.dedup_embedding, corpora[name])
        config = CurateConfig(
            corpus=corpora[name], embeddings=embedded, eval_embeddings=seen, steps=[step], out=run.out("leaks")
        )
        found[name] = run.run(f"leaks-{name}", config)
    return found


def _embed(run: PipelineRun, stage: str, settings: EmbedSettings, corpus: str, previous: str | None = None) -> str:
    if stage in run.urls:
        return run.urls[stage]
    config = EmbedConfig(**dict(settings), corpus=corpus, previous=previous, out=run.out("embed"))
    return run.run(stage, config)
