"""Whether a curation helps: the same small training on each choice of images, scored alike."""

from __future__ import annotations

from collections.abc import Callable

from prefect import flow
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from curation.config import CurateConfig
from curation.steps.config import Sample
from eval.config import CompareConfig, EvaluateConfig
from flows import stages
from flows.config import AblateConfig
from infra import storage
from infra.artifacts import open_artifact
from infra.errors import UserError
from pretrain.config import CheckpointBackbone, PretrainConfig

_Choice = Callable[[int], str]  # what to train on, given the seed


@flow(name="fovea-ablation")
def ablate(config: AblateConfig) -> str:
    """Train and score a small backbone for each choice and seed; return the URL of the comparison."""
    groups: dict[str, list[str]] = {}
    for name, choice in _choices(config).items():
        groups[name] = [_scored(config, choice(seed), seed) for seed in config.seeds]
    title = "Does the curation help?"
    return stages.compare(CompareConfig(title=title, groups=groups, out=_out(config, "compare")))


def _choices(config: AblateConfig) -> dict[str, _Choice]:
    """What to train on.

    Raises:
        UserError: a selection is missing, or judges another corpus.
    """
    corpus = open_artifact(config.corpus, "corpus")
    selections = {name: open_artifact(url, "selection") for name, url in config.selections.items()}
    for name, each in selections.items():
        if each.manifest.inputs["corpus"].id != corpus.id:
            raise UserError(f"selections: {name}: judges another corpus than {config.corpus}; select over that one")

    def always(url: str) -> _Choice:
        return lambda seed: url

    choices = {name: always(url) for name, url in ({"raw": config.corpus} | config.selections).items()}
    if config.random:
        kept = list(selections.values())[-1].metrics["kept"]
        choices["random"] = lambda seed: _random(config, kept, seed)
    return choices


def _random(config: AblateConfig, count: int, seed: int) -> str:
    out = _out(config, "random")
    return stages.curate(CurateConfig(corpus=config.corpus, steps=[Sample(count=count)], seed=seed, out=out))


def _scored(config: AblateConfig, images: str, seed: int) -> str:
    """Report of a backbone trained on some images."""
    schedule = config.pretrain.schedule.model_copy(update={"seed": seed})
    settings = dict(config.pretrain) | {"schedule": schedule}
    trained = stages.pretrain(PretrainConfig(**settings, corpora=[images], out=_out(config, "pretrain")))
    model = CheckpointBackbone(url=trained)
    datasets = {"train": config.train, "test": config.test}
    return stages.evaluate(
        EvaluateConfig(**dict(config.evaluate), datasets=datasets, model=model, out=_out(config, "evaluate"))
    )


def _out(config: AblateConfig, stage: str) -> str:
    return storage.join(config.root, stage, "{id}")


def show(url: str) -> None:
    """Print a comparison to standard output."""
    table = Table("protocol", "images of", "images", "accuracy, %", "gain, 95 % interval", box=None)
    rows = open_artifact(url, "report").read_json("report.json")["rows"]
    for row in rows:
        gain = "" if row["subject"] == rows[0]["subject"] else f"{100 * row['gain']:+.2f}"
        if gain and row["gain_low"] is not None:
            gain += f" ({100 * row['gain_low']:+.2f} – {100 * row['gain_high']:+.2f})"
        table.add_row(row["protocol"], escape(row["subject"]), f"{row['images']:,}", f"{100 * row['value']:.2f}", gain)
    Console(soft_wrap=True, highlight=False).print(table)
