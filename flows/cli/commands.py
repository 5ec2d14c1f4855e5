"""The commands that take a configuration: a file, flags, or both."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flows.orchestration.ephemeral_server import start_ephemeral_server
from flows.orchestration.prefect_settings import set_up_prefect
from infra.notices import print_loading

if TYPE_CHECKING:
    from curation.config import CurateConfig, EmbedConfig, IngestConfig, MaterializeConfig
    from distill.config import DistillConfig, ImportConfig, PublishConfig
    from eval.config import EvaluateConfig, ReportConfig
    from flows.config import AblateConfig, CheckpointEvalConfig, DeploySettings, PipelineConfig
    from infra.artifacts.artifact import Artifact
    from infra.config import Config
    from pretrain.config import PlanConfig, PretrainConfig


@dataclass(frozen=True)
class Command:
    """A command whose settings are a model."""

    name: str
    model_name: str
    """MODULE:NAME of the model, imported when it is needed: a help page must not wait for all models."""
    run: Callable[[Any], None]
    summary: str
    words: str = "[FILE.yaml]"
    """The positional words, as usage shows them."""
    room: str | None = None
    """The room whose recipes may stand in the place of a file."""
    notes: tuple[str, ...] = field(default_factory=tuple)
    """Paragraphs of the help page."""

    @cached_property
    def model(self) -> type[Config]:
        model: type[Config] = pkgutil.resolve_name(self.model_name)
        return model


def print_url(artifact: Artifact | None) -> None:
    """Print where an artifact is; of several ranks of a training the first one does."""
    if artifact is not None and os.environ.get("RANK", "0") == "0":
        print(artifact.url)


def _print_comparison(url: str) -> None:
    from flows.evaluation import show_comparison
    from infra.artifacts.artifact import open_artifact

    show_comparison(open_artifact(url, "report"))
    print(url)


def _run(config: PipelineConfig) -> None:
    from flows.orchestration.pipeline_stages import find_finished
    from flows.outcome import show

    summary = find_finished(config)
    if summary is None:
        print_loading("run", "prefect")
        start_ephemeral_server()
        from flows.orchestration.pipeline import pipeline

        summary = pipeline(config)
    show(config, summary)


def _ingest(config: IngestConfig) -> None:
    from curation.ingest.ingest import describe_problems, ingest

    artifact = ingest(config)
    for line in describe_problems(artifact):
        print(line, file=sys.stderr)
    print_url(artifact)


def _embed(config: EmbedConfig) -> None:
    from curation.embed import embed

    print_url(embed(config))


def _curate(config: CurateConfig) -> None:
    import curation

    print_url(curation.run(config))


def _materialize(config: MaterializeConfig) -> None:
    from curation.materialize import materialize

    print_url(materialize(config))


def _pretrain(config: PretrainConfig) -> None:
    from flows.training import train

    print_url(train("pretrain", config))


def _plan(config: PlanConfig) -> None:
    from flows.planning import show
    from pretrain.planning.plan import plan

    show(config, plan(config))


def _distill(config: DistillConfig) -> None:
    from distill.train.specs import student_urls
    from flows.training import train

    artifact = train("distill", config)
    print_url(artifact)
    if artifact is not None and len(config.students) > 1:
        for name, url in student_urls(artifact, list(config.students)).items():
            print(f"{name}: {url}", file=sys.stderr)


def _evaluate(config: EvaluateConfig) -> None:
    from flows.evaluation import evaluate, show

    artifact = evaluate(config)
    show(artifact)
    print_url(artifact)


def _eval_checkpoints(config: CheckpointEvalConfig) -> None:
    start_ephemeral_server()
    from flows.checkpoint_eval import eval_checkpoints

    _print_comparison(eval_checkpoints(config))


def _ablate(config: AblateConfig) -> None:
    start_ephemeral_server()
    from flows.ablation import ablate

    _print_comparison(ablate(config))


def _import(config: ImportConfig) -> None:
    from distill.weight_import.import_weights import import_weights

    print_url(import_weights(config))


def _publish(config: PublishConfig) -> None:
    from distill.export.publish import publish

    print_url(publish(config))


def _report(config: ReportConfig) -> None:
    from eval.report.run_page import build_report

    print_url(build_report(config))


def _deploy(config: DeploySettings) -> None:
    set_up_prefect()
    from flows.orchestration.deployments import apply, write

    path = write(config)
    print(path)
    if config.apply:
        apply(config, path)
        print(f"prefect worker start --pool {config.work_pool}   # where the flows shall run", file=sys.stderr)


_RECIPE = "[RECIPE | FILE.yaml]"
_MODEL = (
    "MODEL is the URL of a checkpoint or of a published backbone, timm:NAME, open_clip:MODEL/TAG, "
    "transformers:OWNER/NAME, a folder of transformers, torch_hub:FOLDER:ENTRY@FILE, torchscript:FILE or pixels; @FILE "
    "behind a name gives weights in a file. SUITE is quick (default), imagenet, full, or a YAML file with tasks. A "
    "dataset is the URL of a corpus, a folder of class folders, shards, torchvision:NAME/SPLIT, or pairs:IMAGES:MAPS."
)

COMMANDS = {
    command.name: command
    for command in (
        Command(
            "run",
            "flows.config:PipelineConfig",
            _run,
            "Run a whole pipeline: ingest, embed, deduplicate, retrieve, pretrain, evaluate, distill, publish, report.",
            words=_RECIPE,
            room="flows",
            notes=(
                "Each stage has its own keys under its name: --pretrain.schedule.steps 100 is what --schedule.steps "
                "100 is to fovea pretrain.",
                "Example: fovea run webpool --root runs/mine --sources.pool photos/",
            ),
        ),
        Command(
            "ingest",
            "curation.config:IngestConfig",
            _ingest,
            "Index images as a corpus: from a folder, class folders or tar shards. Every file that cannot be used is "
            "listed with its reason.",
            notes=("Example: fovea ingest --source photos/ --out runs/photos/corpus",),
        ),
        Command(
            "embed",
            "curation.config:EmbedConfig",
            _embed,
            "Embed a corpus: one vector an image.",
            notes=("Example: fovea embed --corpus runs/photos/corpus --out runs/photos/vectors",),
        ),
        Command(
            "curate",
            "curation.config:CurateConfig",
            _curate,
            "Select images of a corpus: by duplicates, leaks, and similarity to a curated seed. Every image gets a "
            "verdict.",
            words=_RECIPE,
            room="curation",
            notes=(
                "Example: fovea curate dedup --corpus runs/photos/corpus --embeddings runs/photos/vectors --out "
                "runs/photos/selection",
            ),
        ),
        Command(
            "materialize",
            "curation.config:MaterializeConfig",
            _materialize,
            "Write the images of a selection as a corpus of their own, byte for byte; faces may be blurred.",
        ),
        Command(
            "pretrain",
            "pretrain.config:PretrainConfig",
            _pretrain,
            "Pretrain a teacher on corpora; --launcher starts several ranks, on this machine or others.",
            words=_RECIPE,
            room="pretrain",
            notes=("Example: fovea pretrain tiny_cpu --corpora runs/photos/clean --out runs/photos/teacher",),
        ),
        Command(
            "plan",
            "pretrain.config:PlanConfig",
            _plan,
            "Print what a recipe needs: work, memory by ZeRO stage, days and cost on some GPUs.",
            words=_RECIPE,
            room="pretrain",
            notes=("Example: fovea plan small_gpu --gpus 1 --gpu l4",),
        ),
        Command(
            "distill",
            "distill.config:DistillConfig",
            _distill,
            "Distill frozen teachers into smaller students, several at once if you like.",
            words=_RECIPE,
            room="distill",
            notes=(
                "Example: fovea distill --teacher-checkpoint runs/photos/teacher --corpora runs/photos/clean --out "
                "runs/photos/student --students.student.model.size tiny",
            ),
        ),
        Command(
            "import",
            "distill.config:ImportConfig",
            _import,
            "Import weights of others as a checkpoint: to evaluate, to publish, or to start a pretraining from "
            "(--init-from).",
        ),
        Command(
            "eval",
            "eval.config:EvaluateConfig",
            _evaluate,
            "Evaluate a backbone by a suite of protocols, beside the untrained network and raw pixels.",
            words="[MODEL [SUITE] | FILE.yaml]",
            notes=(
                _MODEL,
                "Example: fovea eval runs/photos/student quick --datasets.train LABELED --datasets.test LABELED",
            ),
        ),
        Command(
            "eval-checkpoints",
            "flows.config:CheckpointEvalConfig",
            _eval_checkpoints,
            "Score the teachers of a running training as they are written (--runtime.export-teacher-every of fovea "
            "pretrain).",
        ),
        Command(
            "ablate",
            "flows.config:AblateConfig",
            _ablate,
            "Measure whether a curation helps: train small backbones alike on the raw corpus, on each selection and on "
            "random images.",
            notes=("pretrain and evaluate have the keys of fovea pretrain and fovea eval.",),
        ),
        Command(
            "publish",
            "distill.config:PublishConfig",
            _publish,
            "Publish a checkpoint as a backbone that timm, torch.hub, transformers and onnxruntime load, with a model "
            "card.",
        ),
        Command(
            "report",
            "eval.config:ReportConfig",
            _report,
            "Write the page of a run from its artifacts, one self-contained file.",
        ),
        Command(
            "deploy",
            "flows.config:DeploySettings",
            _deploy,
            "Register the pipeline and all stages as deployments of a Prefect server: writes prefect.yaml and applies "
            "it.",
        ),
    )
}
"""By name, in the order of a run."""
