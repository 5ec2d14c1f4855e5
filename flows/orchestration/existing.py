"""Artifacts of stages that exist already, found without Prefect and without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from curation.config import CurateConfig, EmbedConfig, IngestConfig, MaterializeConfig
from curation.curate import selection_spec
from curation.embed import embeddings_spec
from curation.ingest.ingest import find_ingested
from curation.materialize import corpus_spec
from distill.config import DistillConfig, PublishConfig
from distill.export.publish import backbone_spec
from distill.train.specs import checkpoint_spec as distilled_spec
from distill.train.specs import require_students
from eval.config import EvaluateConfig, ReportConfig
from eval.evaluate import report_spec as evaluation_spec
from eval.gate import require
from eval.report.run_page import report_spec
from infra.artifacts.artifact import Artifact, ArtifactSpec, find_existing
from infra.config import Output
from pretrain.checkpoint.spec import checkpoint_spec
from pretrain.config import PretrainConfig

StageConfig = (
    IngestConfig
    | EmbedConfig
    | CurateConfig
    | MaterializeConfig
    | PretrainConfig
    | DistillConfig
    | EvaluateConfig
    | PublishConfig
    | ReportConfig
)
_SPECS: Mapping[type[Output], Callable[[Any], ArtifactSpec]] = {
    EmbedConfig: embeddings_spec,
    CurateConfig: selection_spec,
    MaterializeConfig: corpus_spec,
    PretrainConfig: checkpoint_spec,
    DistillConfig: distilled_spec,
    EvaluateConfig: evaluation_spec,
    PublishConfig: backbone_spec,
    ReportConfig: report_spec,
}


def find_stage_output(config: StageConfig) -> Artifact | None:
    """The artifact that a stage's configuration asks for, if it has been made.

    Raises:
        UserError: an input is missing, or the artifact's place holds another one.
        RegressionError: it is a report whose scores fell further than the configuration's gate allows.
    """
    if isinstance(config, IngestConfig):
        return find_ingested(config)
    if isinstance(config, PublishConfig) and config.hf_repo is not None:
        return None  # whether it is on the Hub, too, only the Hub can tell
    spec = _SPECS[type(config)](config)
    if isinstance(config, DistillConfig):
        require_students(spec, config)
    artifact = find_existing(spec, config.out)
    if artifact is not None and isinstance(config, EvaluateConfig) and config.gate is not None:
        require(artifact, config.gate)
    return artifact
