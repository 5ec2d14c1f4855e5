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
            raise ValueError(f"the environment variable {name} is not set; set it to where the data lies")
    return _VARIABLE.sub(lambda match: os.environ[match[1]], value)


class Sources(Config):
    """Where the images are: folders or tar shards at any URL; `${NAME}` is an environment variable."""

    pool: str
    """The pool to curate and train on."""
    test: str
    """The labeled evaluation set; the pool is decontaminated against it."""
    train: str
    """The labeled set that kNN and probe learn from."""
    seed: str | None = None
    """The curated seed of retrieval; joins the pool in training."""
    evaluation: dict[str, str] = Field(default_factory=dict)
    """Further datasets that tasks of `evaluate` name. The pool is not decontaminated against them, but leaks are
    counted."""

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
    """A table of images of the pool that are known to be in the evaluation set."""

    table: str
    """Path of a CSV file; `${NAME}` is an environment variable."""
    column: str
    """Its column with the pool's keys."""

    _expand = field_validator("table", mode="before")(expand_variables)


class AblateConfig(Config):
    """Does a curation help? Small backbones, trained alike on each choice of images."""

    root: str
    """URL under which every artifact is written."""
    corpus: str
    """URL of the corpus that was curated."""
    selections: dict[str, str] = Field(min_length=1)
    """Name of each choice and the URL of its selection over the corpus."""
    random: bool = True
    """Train also on random images of the corpus, as many as the last selection keeps, others for each seed."""
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    """Of the trainings on each choice; with fewer than three little can be told."""
    train: str
    """URL of the labeled corpus that kNN and probe learn from."""
    test: str
    """URL of the labeled corpus that is scored."""
    pretrain: PretrainSettings = PretrainSettings()
    """The small backbone: all choices get the same steps and batches, the seed apart."""
    evaluate: EvaluateSettings = Field(default_factory=lambda: EvaluateSettings(baselines=False))
    """Protocols."""

    @model_validator(mode="after")
    def _names_and_seeds(self) -> AblateConfig:
        if taken := {"raw", "random"} & set(self.selections):
            raise ValueError(f"selections: {min(taken)} is what the ablation itself adds; give another name")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: each counts once")
        return self


class CheckpointEvalSettings(EvaluateSettings):
    """How the teachers of a running training are scored."""

    poll_seconds: float = Field(30.0, gt=0)
    """Between looks for a new teacher."""
    patience_hours: float = Field(24.0, gt=0)
    """How long nothing may come before it is given up."""


class CheckpointEvalConfig(CheckpointEvalSettings):
    """A training that writes teachers (runtime.export_teacher_every), and what they are scored on."""

    training: str
    """URL of its checkpoint, which need not be there yet."""
    datasets: dict[str, str] = Field(min_length=1)
    """Names that tasks use (train, test, ...) and URLs of their corpora."""
    leaks: dict[str, str] = Field(default_factory=dict)
    """For names of datasets the URL of a selection over each: what it drops was seen in training."""
    out: str | None = None
    """URL below which reports are written; null: that of the training and `.reports`."""


class CheckpointEvalPipelineSettings(CheckpointEvalSettings):
    """How a pipeline scores the teachers that its pretraining exports every `pretrain.runtime.export_teacher_every`
    steps."""

    deployment: str | None = None
    """Name of a Prefect deployment of the flow fovea-eval-checkpoints, FLOW/DEPLOYMENT, whose worker scores; null: a
    process of low priority on this machine."""


class PipelineConfig(Config):
    """From images to a published backbone."""

    name: str = "pipeline"
    """Title of the report."""
    root: str
    """URL under which every artifact of the run is written."""
    synthetic: SyntheticSettings | None = None
    """Make the synthetic corpus and run on it; or give `sources`."""
    sources: Sources | None = None
    """Images to run on."""
    incremental: bool = False
    """The pool grows between runs under this root: only what is new is embedded and compared (`previous` of fovea embed
    and fovea curate)."""
    known_leaks: KnownLeaks | None = None
    """Ground truth of decontamination, if there is any."""
    ingest: IngestSettings = IngestSettings()
    """What counts as an image."""
    dedup_embedding: EmbedSettings = EmbedSettings()
    """Embedding by which copies are found."""
    retrieval_embedding: EmbedSettings = EmbedSettings()
    """Embedding by which images like the seed are found."""
    deduplicate: CurateSettings = CurateSettings()
    """Steps that compare copies."""
    retrieve: CurateSettings = Field(default_factory=lambda: CurateSettings(steps=[Retrieve()]))
    """Steps that compare with the seed; left out where there is no seed."""
    pretrain: PretrainSettings = PretrainSettings()
    """The teacher."""
    distill: DistillSettings = DistillSettings()
    """The student."""
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    """Protocols for both."""
    checkpoint_eval: CheckpointEvalPipelineSettings | None = None
    """Protocols for the teachers that are written while the pretraining goes on; null: they are not scored."""
    publish: PublishSettings = PublishSettings()
    """The published student."""
    report: ReportSettings = ReportSettings()
    """The page."""

    def eval_dataset_names(self) -> list[str]:
        """Names of the further datasets."""
        return list(self.sources.evaluation) if self.sources is not None else []

    @model_validator(mode="after")
    def _one_source(self) -> PipelineConfig:
        if (self.synthetic is None) == (self.sources is None):
            raise ValueError("give either sources or synthetic")
        return self


class DeploySettings(Config):
    """How flows are registered with a Prefect server."""

    pipeline: str
    """Path of the pipeline's YAML file, whose keys are the deployment's parameters; variables in it are the worker's.
    """
    root: str | None = None
    """URL under which artifacts are written, in place of the file's."""
    name: str = Field("fovea", pattern=r"^[^/%&<>]+$")
    """Name of the deployments."""
    work_pool: str = "fovea"
    """The work pool whose workers run them; made if it is not there."""
    work_pool_type: Literal["process", "docker", "kubernetes"] = "process"
    """Of the pool. Trainings on SLURM are queued by a worker of type process on a login node (launcher slurm)."""
    cron: str | None = None
    """When the pipeline runs by itself, as in "0 3 * * 1"; null: when it is told to."""
    min_change: float | None = Field(None, gt=0, le=1)
    """With it the schedule only curates, and the pipeline runs when this share of the selection differs from what was
    last trained on."""
    heartbeat_seconds: int = Field(60, ge=30)
    """Seconds between a run's signs of life; where three are missing it is taken for dead and goes on elsewhere."""
    notification_block: str | None = None
    """Notification block that is told of failures and regressions, as TYPE/NAME: slack-webhook/ops."""
    timezone: str = "UTC"
    """Of the schedule."""
    tags: list[str] = Field(default_factory=list)
    """Tags beside fovea."""
    base_job_template: str | None = None
    """JSON file with the job template of a pool that is made; see infra/kubernetes/job-template.json."""
    job_variables: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the pool's job template: image, namespace, env and the like."""
    file: str = "prefect.yaml"
    """Where the file is written."""
    apply: bool = True
    """Register with the server of PREFECT_API_URL; false: write the file alone."""
