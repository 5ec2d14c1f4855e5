"""The command line: `fovea STAGE FILE.yaml --flag value`. Flags and file share the stage's configuration model."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
import docstring_parser
from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError

from curation.config import CurateConfig, EmbedConfig, IngestConfig, MaterializeConfig
from distill.config import DistillConfig, ImportConfig, PublishConfig
from eval.config import EvaluateConfig, ReportConfig
from flows.config import AblateConfig, DeploySettings, FollowConfig, PipelineConfig
from flows.overriding import merged
from infra.claims import BUSY
from infra.config import Config, describe, load_yaml
from infra.errors import Busy, Preempted, Regression, UserError
from infra.launch.job import TRY_AGAIN, USER_MISTAKE
from pretrain.config import PlanConfig, PretrainConfig

if TYPE_CHECKING:
    from infra.artifacts import Artifact


def _shown_default(value: Any) -> str:
    """A default as the help shows it: lists of models by their kinds."""
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(str(getattr(each, "kind", each)) for each in values)


app = App(
    name="fovea",
    version=lambda: importlib.metadata.version("fovea"),
    help_format="plaintext",
    help="From a pile of images to a published vision backbone. Every command takes a YAML file, flags, or both "
    "(flags win), writes one artifact, and returns at once if that artifact exists.",
    default_parameter=Parameter(negative=(), negative_iterable=(), negative_bool=(), show_default=_shown_default),
)

File = Annotated[
    Path | None,
    Parameter(
        help="YAML file with the same keys as the flags; for pretrain, plan, curate and distill also a recipe's name."
    ),
]
Flags = Parameter(name="*")
Model = Annotated[str | None, Parameter(help="The backbone; or one YAML file with the same keys as the flags, alone.")]
Suite = Annotated[
    str | None,
    Parameter(help="quick, imagenet, full, or a YAML file with tasks, and datasets perhaps."),
]


@app.command(sort_key=0)
def run(file: File = None, /, *, config: Annotated[PipelineConfig, Flags]) -> None:
    """Run a whole pipeline: ingest, embed, deduplicate, retrieve, pretrain, evaluate, distill, publish, report.

    Each stage has its own keys under its name: ingest, copies and likeness (see
    fovea embed), deduplicate and retrieve (fovea curate), pretrain, distill,
    evaluate (fovea eval), publish, report. So --pretrain.schedule.steps 100 is
    what --schedule.steps 100 is to fovea pretrain.
    """
    _set_up_prefect()
    from flows.outcome import show
    from flows.pipeline import pipeline

    show(config, pipeline(config))


def _set_up_prefect() -> None:
    for name, value in _PREFECT_DEFAULTS.items():
        os.environ.setdefault(name, value)


# Prefect must neither call home nor print tracebacks of mistakes that are reported in one line here.
_PREFECT_DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
}


@app.command(sort_key=1)
def ingest(file: File = None, /, *, config: Annotated[IngestConfig, Flags]) -> None:
    """Images to a corpus: a folder, class folders or tar shards, every unusable file listed with its reason."""
    from curation.ingest import ingest, notes

    artifact = ingest(config)
    for line in notes(artifact):
        print(line, file=sys.stderr)
    _made(artifact)


@app.command(sort_key=2)
def embed(file: File = None, /, *, config: Annotated[EmbedConfig, Flags]) -> None:
    """A corpus to embeddings: one vector an image."""
    from curation.embed import embed

    _made(embed(config))


@app.command(sort_key=3)
def curate(file: File = None, /, *, config: Annotated[CurateConfig, Flags]) -> None:
    """A corpus to a selection: a verdict for every image, by duplicates, leaks and nearness to a seed."""
    import curation

    _made(curation.run(config))


@app.command(sort_key=3)
def why(key: str, /, *, selection: str, page: Path | None = None) -> None:
    """Why an image was kept or dropped, what it lost to and what it stands for.

    Args:
        key: the image's key, as selection.parquet and the corpus's index have it.
        selection: URL of the selection.
        page: HTML file to write the same to, with pictures.
    """
    from eval.why import why, write_page

    story = why(selection, key)
    print(story.text())
    if page is not None:
        write_page(story, page)


@app.command(sort_key=4)
def materialize(file: File = None, /, *, config: Annotated[MaterializeConfig, Flags]) -> None:
    """A selection to a corpus of its own, byte for byte; faces may be blurred."""
    from curation.curate import materialize

    _made(materialize(config))


@app.command(sort_key=5)
def pretrain(file: File = None, /, *, config: Annotated[PretrainConfig, Flags]) -> None:
    """Corpora to a teacher checkpoint; --launcher starts several ranks, on this machine or others."""
    from flows.trainings import train

    _made(train("pretrain", config))


@app.command(sort_key=6)
def plan(file: File = None, /, *, config: Annotated[PlanConfig, Flags]) -> None:
    """What a recipe needs before it runs: work, memory by ZeRO stage, days and cost on some GPUs."""
    from flows.planning import show
    from pretrain.planning.plan import plan

    show(config, plan(config))


@app.command(sort_key=7)
def distill(file: File = None, /, *, config: Annotated[DistillConfig, Flags]) -> None:
    """Frozen teachers to smaller students, several at once if you like."""
    from distill.distill import student_urls
    from flows.trainings import train

    artifact = train("distill", config)
    _made(artifact)
    if artifact is not None and len(config.students) > 1:
        for name, url in student_urls(artifact, list(config.students)).items():
            print(f"{name}: {url}", file=sys.stderr)


@app.command(name="eval", sort_key=8)
def evaluate(model: Model = None, suite: Suite = None, /, *, config: Annotated[EvaluateConfig, Flags]) -> None:
    """A backbone to a report, by a suite of protocols, beside the untrained network and raw pixels.

    MODEL is the URL of a checkpoint or of a published backbone, timm:NAME,
    open_clip:MODEL/TAG, transformers:OWNER/NAME, a folder of transformers,
    hub:FOLDER:ENTRY@FILE, torchscript:FILE or pixels; behind a name, @FILE
    stands for weights in a file. A dataset is the URL of a corpus, a folder of
    class folders, shards, torchvision:NAME/SPLIT, or pairs:IMAGES:MAPS.
    """
    from flows.evaluation import evaluate, show

    artifact = evaluate(config)
    show(artifact)
    _made(artifact)


@app.command(sort_key=8)
def follow(file: File = None, /, *, config: Annotated[FollowConfig, Flags]) -> None:
    """Score the teachers of a running training as they are written (--runtime.teachers-every of fovea pretrain)."""
    _set_up_prefect()
    from flows.following import follow

    print(follow(config))


@app.command(sort_key=9)
def compare(*reports: str, title: str = "Comparison", out: str = "runs/compare/{id}") -> None:
    """Reports of evaluations side by side: one table, one picture, one page.

    Args:
        reports: URLs of reports, or NAME=URL; the others are compared with the first.
        title: heading of the page.
        out: URL of the comparison; {id} stands for its id.
    """
    from flows.evaluation import compare, show_comparison

    artifact = compare(reports, title, out)
    show_comparison(artifact)
    _made(artifact)


@app.command(sort_key=9)
def ablate(file: File = None, /, *, config: Annotated[AblateConfig, Flags]) -> None:
    """Does a curation help? Small backbones trained alike on the raw corpus, on each selection and on random images.

    pretrain and evaluate (fovea eval) have their stages' keys.
    """
    _set_up_prefect()
    from flows.ablation import ablate, show

    url = ablate(config)
    show(url)
    print(url)


@app.command(name="import", sort_key=7)
def import_weights(file: File = None, /, *, config: Annotated[ImportConfig, Flags]) -> None:
    """Weights of others to a checkpoint: to evaluate, publish, or start a pretraining from (--start)."""
    from distill.importing import import_weights

    _made(import_weights(config))


@app.command(sort_key=9)
def publish(file: File = None, /, *, config: Annotated[PublishConfig, Flags]) -> None:
    """A checkpoint to a backbone that timm, torch.hub, transformers and onnxruntime load, with a model card."""
    from distill.publish import publish

    _made(publish(config))


@app.command(sort_key=10)
def report(file: File = None, /, *, config: Annotated[ReportConfig, Flags]) -> None:
    """Artifacts of a run to one self-contained page."""
    from eval.page import report

    _made(report(config))


@app.command(sort_key=11)
def deploy(file: File = None, /, *, config: Annotated[DeploySettings, Flags]) -> None:
    """The pipeline and all stages as deployments of a Prefect server: writes prefect.yaml and applies it."""
    _set_up_prefect()
    from flows.deployments import apply, write

    path = write(config)
    print(path)
    if config.apply:
        apply(config, path)
        print(f"prefect worker start --pool {config.pool}   # where the flows shall run", file=sys.stderr)


@app.command(sort_key=11)
def ui(root: str = "runs", /, *, host: str = "127.0.0.1", port: int = 4300, names: list[str] | None = None) -> None:
    """Look at all runs under a root in a browser: scores, pages, lineage, images, search by image or text. Read-only.

    Args:
        root: URL of the folder, ROOT of the pipelines.
        host: address to listen at; whoever reaches it sees everything under the root.
        port: port to listen at.
        names: further names that browsers may call it by, a proxy's say.
    """
    from eval.browse.server import serve

    print(f"http://{host}:{port}", file=sys.stderr)
    serve(root, host, port, names or [])


@app.command(sort_key=11)
def doctor(*, storage: str | None = None, json: bool = False) -> None:
    """Whether all that Fovea stands on is there and works: a line each, with the remedy.

    Ends with exit code 1 where something fails.

    Args:
        storage: URL of a folder or bucket that is written to, read, and cleaned again.
        json: print the lines as JSON.
    """
    _set_up_prefect()
    from flows.doctor import findings, show

    found = list(findings(storage))
    show(found, json)
    if any(each.status == "fail" for each in found):
        raise SystemExit(1)


def _made(artifact: Artifact | None) -> None:
    if artifact is not None and os.environ.get("RANK", "0") == "0":  # of several ranks of a training one says it
        print(artifact.url)


_CONFIGS: dict[str, type[Config]] = {
    "run": PipelineConfig,
    "ablate": AblateConfig,
    "ingest": IngestConfig,
    "embed": EmbedConfig,
    "curate": CurateConfig,
    "materialize": MaterializeConfig,
    "pretrain": PretrainConfig,
    "plan": PlanConfig,
    "distill": DistillConfig,
    "eval": EvaluateConfig,
    "follow": FollowConfig,
    "import": ImportConfig,
    "publish": PublishConfig,
    "report": ReportConfig,
    "deploy": DeploySettings,
}


@app.meta.default
def _with_file(*tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]) -> None:
    """Read the YAML file that follows a command, if there is one, beneath its flags."""
    if tokens[:1] == ("eval",):
        content = _named(list(takewhile(lambda token: not token.startswith("-"), tokens[1:])))
        app["eval"].config = [cyclopts.config.Dict({"eval": content}, source=" ".join(tokens[1:3]))]
    elif len(tokens) > 1 and not tokens[1].startswith("-") and tokens[0] in _CONFIGS:
        file = _recipe(tokens[0], tokens[1])
        left, content = merged(tokens[2:], load_yaml(file), _CONFIGS[tokens[0]])
        tokens = (*tokens[:2], *left)
        _check(content, _CONFIGS[tokens[0]], tokens[1])
        # Below the command's name: on top, keys that are named like a command (pretrain, say) would be passed over.
        app[tokens[0]].config = [cyclopts.config.Dict({tokens[0]: content}, source=tokens[1])]
    app(tokens, exit_on_error=False, print_error=False)


def _named(words: list[str]) -> dict[str, Any]:
    """What is evaluated and how, by the words before the flags: a file alone, or a model and a suite."""
    from pretrain.naming import named

    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        content = load_yaml(words[0])
    else:
        content = {"model": named(words[0])} if words else {}
        if len(words) > 1:
            content |= load_yaml(words[1]) if words[1].endswith((".yaml", ".yml")) else {"suite": words[1]}
    _check(content, EvaluateConfig, " ".join(words))
    return content


def _recipe(command: str, name: str) -> str:
    """The file of a recipe that comes with the command's room; any other name is a path."""
    room = {"pretrain": "pretrain", "plan": "pretrain", "curate": "curation", "distill": "distill"}.get(command)
    if room is None or not name.isidentifier():
        return name
    recipes = {path.stem: path for path in (Path(__file__).parents[1] / room / "recipes").glob("*.yaml")}
    if name not in recipes and not Path(name).exists():
        known = ", ".join(sorted(recipes))
        raise UserError(f"{name}: no such file and no recipe; recipes of {command} are {known}")
    return str(recipes.get(name, name))


def _check(content: dict[str, Any], model: type[Config], file: str) -> None:
    """Report what is wrong in the file itself; what is missing there may still come from a flag."""
    try:
        model.model_validate(content)
    except ValidationError as error:
        if any(problem["type"] != "missing" for problem in error.errors()):
            raise UserError(f"{file}: {describe(error, model)}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a user's mistake is one line on standard error and exit code 2."""
    _skip_class_docstrings()
    try:
        app.meta(arguments, exit_on_error=False, print_error=False)
    except Busy as error:
        print(f"fovea: {error}", file=sys.stderr)
        sys.exit(BUSY)
    except UserError as error:
        _fail(str(error))
    except CycloptsError as error:
        _fail(_explain(error))
    except Preempted as stopped:
        print(f"fovea: {stopped}", file=sys.stderr)
        sys.exit(TRY_AGAIN)
    except Regression as error:
        print(f"fovea: {error}", file=sys.stderr)
        sys.exit(1)
    except ChildProcessError as error:  # its own traceback or message was shown
        print(f"fovea: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _skip_class_docstrings() -> None:
    """Keep cyclopts from parsing the source of every model, and of pydantic's base, for each help page.

    The fields carry their descriptions already; the parsing takes two seconds for the pipeline's help.
    """
    parse = docstring_parser.parse_from_object
    docstring_parser.parse_from_object = lambda item: (
        docstring_parser.Docstring() if isinstance(item, type) else parse(item)
    )


def _explain(error: CycloptsError) -> str:
    """cyclopts' message; for a value that the model refuses, ours."""
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ValidationError):
        command = next(iter(error.command_chain or ()), "")
        return describe(cause, _CONFIGS.get(command, Config))
    return f"{error}; see fovea {' '.join(error.command_chain or ())} --help"


def _fail(message: str) -> None:
    print(f"fovea: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(USER_MISTAKE)
