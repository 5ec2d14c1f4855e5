"""Whether a curation helps: the same small training on each choice of images, scored alike."""

from __future__ import annotations

from collections.abc import Callable

from prefect import flow

from curation.config import CurateConfig
from curation.steps.config import RandomSample
from eval.config import CompareConfig, EvaluateConfig
from flows.config import AblateConfig
from flows.orchestration import stages
from infra.artifacts.artifact import open_artifact
from infra.errors import UserError
from infra.storage import filesystem
from pretrain.backbones.config import CheckpointBackboneConfig
from pretrain.config import PretrainConfig

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
    return stages.curate(CurateConfig(corpus=config.corpus, steps=[RandomSample(count=count)], seed=seed, out=out))


def _scored(config: AblateConfig, images: str, seed: int) -> str:
    """Report of a backbone trained on some images."""
    schedule = config.pretrain.schedule.model_copy(update={"seed": seed})
    settings = dict(config.pretrain) | {"schedule": schedule}
    trained = stages.pretrain(PretrainConfig(**settings, corpora=[images], out=_out(config, "pretrain")))
    model = CheckpointBackboneConfig(url=trained)
    datasets = {"train": config.train, "test": config.test}
    return stages.evaluate(
        EvaluateConfig(**dict(config.evaluate), datasets=datasets, model=model, out=_out(config, "evaluate"))
    )


def _out(config: AblateConfig, stage: str) -> str:
    return filesystem.join(config.root, stage, "{id}")
