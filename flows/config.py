"""A whole pipeline as one file."""

from __future__ import annotations

import os
import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from curation.config import CurateSettings, EmbedSettings, IngestSettings, SyntheticSettings
from curation.steps.config import Retrieve
from distill.config import DistillSettings, PublishSettings
from eval.config import EvaluateSettings, ReportSettings
from infra.config import Config
from pretrain.config import PretrainSettings

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def expand_variables(value: Any) -> Any:
    """Replace `${NAME}` by the environment variable of that name."""
    if not isinstance(value, str):
        return value
    for name in _VARIABLE.findall(value):
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} is not set; set it to the data's location")
    return _VARIABLE.sub(lambda match: os.environ[match[1]], value)


class Sources(Config):
    """Images of a pipeline: folders or tar shards at any URL. `${NAME}` stands for an environment variable."""

    pool: str
    """URL of the pool to curate and train on."""
    test: str
    """URL of the labeled test set. The pool is decontaminated against it."""
    train: str
    """URL of the labeled set that kNN and probes learn from."""
    seed: str | None = None
    """URL of the curated seed of retrieval, which joins the pool in training. null: no retrieval."""
    evaluation: dict[str, str] = Field(default_factory=dict)
    """URLs of further datasets that tasks of `evaluate` name. Their leaks are counted, but the pool is not
    decontaminated against them."""

    _expand = field_validator("pool", "test", "train", "seed", mode="before")(expand_variables)

    @field_validator("evaluation", mode="before")
    @classmethod
    def _expand_each(cls, value: Any) -> Any:
        return {name: expand_variables(each) for name, each in value.items()} if isinstance(value, dict) else value

    @field_validator("evaluation")
    @classmethod
    def _no_role(cls, value: dict[str, str]) -> dict[str, str]:
        if taken := set(value) & {"pool", "test", "train", "seed"}:
            raise ValueError(f"{min(taken)} is a role of its own; give the dataset another name")
        return value


class KnownLeaks(Config):
    """Table of images of the pool that are known to be in the test set."""

    table: str
    """Path of a CSV file; `${NAME}` is an environment variable."""
    column: str
    """Column with the pool's keys."""

    _expand = field_validator("table", mode="before")(expand_variables)


class AblateConfig(Config):
    """Train small backbones alike on several selections and compare them."""

    root: str
    """URL of the folder of all artifacts."""
    corpus: str
    """URL of the curated corpus."""
    selections: dict[str, str] = Field(min_length=1)
    """URLs of selections over the corpus, by name."""
    random: bool = True
    """Train also on random images of the corpus, as many as the last selection keeps; each seed samples others."""
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    """Seeds of the trainings on each selection. Fewer than three tell little."""
    train: str
    """URL of the labeled training corpus of the protocols."""
    test: str
    """URL of the labeled test corpus of the protocols."""
    pretrain: PretrainSettings = PretrainSettings()
    """Settings of the small backbone. Steps and batches are the same for all selections."""
    evaluate: EvaluateSettings = Field(default_factory=lambda: EvaluateSettings(baselines=False))
    """Protocols of the comparison."""

    @model_validator(mode="after")
    def _names_and_seeds(self) -> AblateConfig:
        if taken := {"raw", "random"} & set(self.selections):
            raise ValueError(f"selections: {min(taken)} is what the ablation itself adds; give another name")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: each counts once")
        return self


class CheckpointEvalSettings(EvaluateSettings):
    """Evaluation of the teachers that a running training exports."""

    poll_seconds: float = Field(30.0, gt=0)
    """Seconds between checks for a new teacher."""
    patience_hours: float = Field(24.0, gt=0)
    """Hours without a new teacher after which the evaluation stops."""


class CheckpointEvalConfig(CheckpointEvalSettings):
    """Evaluate the teachers that a training exports (runtime.export_teacher_every)."""

    training: str
    """URL of the training's checkpoint, which need not exist yet."""
    datasets: dict[str, str] = Field(min_length=1)
    """Names that tasks use (train, test, ...) and URLs of their corpora."""
    leaks: dict[str, str] = Field(default_factory=dict)
    """For names of datasets the URL of a selection over each: what it drops was seen in training."""
    out: str | None = None
    """URL below which reports are written. null: the training's URL and `.reports`."""


class CheckpointEvalPipelineSettings(CheckpointEvalSettings):
    """How a pipeline scores the teachers that its pretraining exports every `pretrain.runtime.export_teacher_every`
    steps."""

    deployment: str | None = None
    """Name of a Prefect deployment of the flow fovea-eval-checkpoints, FLOW/DEPLOYMENT, whose worker scores; null: a
    process of low priority on this machine."""


class PipelineConfig(Config):
    """A pipeline from images to a published backbone."""

    name: str = "pipeline"
    """Title of the report."""
    root: str
    """URL of the folder of all artifacts of the run."""
    synthetic: SyntheticSettings | None = None
    """Settings of a synthetic corpus, which replaces `sources`. null: none."""
    sources: Sources | None = None
    """Images of the run. null: `synthetic`."""
    incremental: bool = False
    """Reuse vectors and comparisons of the previous run under this root, so that only new images are embedded and
    compared."""
    known_leaks: KnownLeaks | None = None
    """Ground truth of the decontamination. null: none."""
    ingest: IngestSettings = IngestSettings()
    """Settings of `fovea ingest`."""
    dedup_embedding: EmbedSettings = EmbedSettings()
    """Embedding for the steps of `deduplicate`."""
    retrieval_embedding: EmbedSettings = EmbedSettings()
    """Embedding for the steps of `retrieve`."""
    deduplicate: CurateSettings = CurateSettings()
    """Steps that find duplicates and leaks."""
    retrieve: CurateSettings = Field(default_factory=lambda: CurateSettings(steps=[Retrieve()]))
    """Steps that compare with the seed; skipped without a seed."""
    pretrain: PretrainSettings = PretrainSettings()
    """Settings of the teacher's pretraining."""
    distill: DistillSettings = DistillSettings()
    """Settings of the students' distillation."""
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    """Protocols for teacher and students."""
    checkpoint_eval: CheckpointEvalPipelineSettings | None = None
    """Protocols for the teachers that the pretraining exports. null: none."""
    publish: PublishSettings = PublishSettings()
    """Name, license and formats of the published students."""
    report: ReportSettings = ReportSettings()
    """Title and galleries of the run's page."""

    def eval_dataset_names(self) -> list[str]:
        """Names of the further datasets."""
        return list(self.sources.evaluation) if self.sources is not None else []

    @model_validator(mode="after")
    def _one_source(self) -> PipelineConfig:
        if (self.synthetic is None) == (self.sources is None):
            raise ValueError("give either sources or synthetic")
        return self


class DeploySettings(Config):
    """Registration of the flows with a Prefect server."""

    pipeline: str
    """Path of the pipeline's YAML file; its keys become the deployment's parameters. Environment variables in it are
    the worker's."""
    root: str | None = None
    """URL of the artifacts' folder instead of the file's. null: the file's."""
    name: str = Field("fovea", pattern=r"^[^/%&<>]+$")
    """Name of the deployments."""
    work_pool: str = "fovea"
    """Name of the work pool whose workers run the deployments. It is created if it does not exist."""
    work_pool_type: Literal["process", "docker", "kubernetes"] = "process"
    """Type of the work pool. Trainings on SLURM are queued by a worker of type process on a login node (launcher
    slurm)."""
    cron: str | None = None
    """Schedule of the pipeline, such as "0 3 * * 1". null: no schedule."""
    min_change: float | None = Field(None, gt=0, le=1)
    """Minimum changed share of the selection for a scheduled run. With it, the schedule runs the curation alone, and
    the pipeline runs when the share is reached. null: the schedule runs the pipeline."""
    heartbeat_seconds: int = Field(60, ge=30)
    """Seconds between a run's heartbeats. After three missing ones the run is marked crashed and retried."""
    notification_block: str | None = None
    """Prefect block TYPE/NAME, such as slack-webhook/ops, that is notified of failures and regressions. null: none."""
    timezone: str = "UTC"
    """Time zone of the schedule."""
    tags: list[str] = Field(default_factory=list)
    """Tags beside fovea."""
    base_job_template: str | None = None
    """Path of a JSON file with the job template of a created work pool; see infra/kubernetes/job-template.json. null:
    Prefect's."""
    job_variables: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the pool's job template: image, namespace, env and the like."""
    file: str = "prefect.yaml"
    """Path of the prefect.yaml to write."""
    apply: bool = True
    """Register with the server of PREFECT_API_URL. false: only write the file."""
