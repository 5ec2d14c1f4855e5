"""Recipes, suites and pipelines that come with Fovea, and the kinds that settings name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from flows.cli.schema import item_models, kind_of, models, options
from infra.errors import UserError

_ROOT = Path(__file__).parents[2]
_FOLDERS = {
    "pretrain": _ROOT / "pretrain" / "recipes",
    "curate": _ROOT / "curation" / "recipes",
    "distill": _ROOT / "distill" / "recipes",
    "eval": _ROOT / "eval" / "suites",
    "run": _ROOT / "flows" / "pipelines",
}
"""By the command that reads them."""
_ROOMS = {"pretrain": "pretrain", "curation": "curate", "distill": "distill", "flows": "run"}


def recipes_of(command: str) -> dict[str, Path]:
    """Files by name."""
    return {path.stem: path for path in sorted(_FOLDERS[command].glob("*.yaml"))}


def write_example_pipeline(file: Path) -> None:
    """Write the example pipeline.

    Raises:
        UserError: the file exists, or its folder does not.
    """
    try:
        with file.open("x", encoding="utf-8") as target:
            target.write((_ROOT / "flows" / "templates" / "pipeline.yaml").read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"{file}: exists already; name another file") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; name another file") from None


def recipe_path(room: str, word: str) -> str:
    """The file that a word names: a recipe of a room, or the path of a file.

    Raises:
        UserError: it names neither.
    """
    known = recipes_of(_ROOMS[room])
    if word in known:
        return str(known[word])
    if not Path(word).exists() and not word.endswith((".yaml", ".yml")):
        raise UserError(f"{word}: no such file and no recipe; recipes are {', '.join(known)}")
    return word


def listing() -> str:
    """All recipes with the first line of each, and all kinds."""
    lines = []
    for command in _FOLDERS:
        what = {"eval": "suites of fovea eval", "run": "pipelines of fovea run"}.get(
            command, f"recipes of fovea {command}"
        )
        lines += [f"{what}:", *(f"  {name:<24} {_headline(path)}" for name, path in recipes_of(command).items()), ""]
    for title, names in kinds().items():
        lines += [f"{title}: {', '.join(names)}"]
    return "\n".join(lines)


def text_of(name: str) -> str:
    """The file of a recipe, suite or pipeline.

    Raises:
        UserError: there is none of this name.
    """
    for command in _FOLDERS:
        if name in recipes_of(command):
            return recipes_of(command)[name].read_text()
    raise UserError(f"{name}: no recipe, suite or pipeline of this name; fovea recipes lists them")


def _headline(path: Path) -> str:
    """The first sentence of the comment that a file begins with."""
    comment = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(comment[: comment.index("")] if "" in comment else comment)
    return text.split(". ")[0].rstrip(".")


def kinds() -> Mapping[str, list[str]]:
    """Values of `kind`, and names of formats, by what they are kinds of."""
    from curation.config import CurateConfig, EmbedConfig
    from distill.config import DistillConfig, PublishConfig
    from eval.config import EvaluateConfig
    from pretrain.config import PretrainConfig

    return {
        "backbones": [str(kind_of(each)) for each in models(EmbedConfig.model_fields["backbone"].annotation)],
        "curation steps": _item_kinds(CurateConfig, "steps"),
        "pretraining objectives": _item_kinds(PretrainConfig, "objectives"),
        "distillation objectives": _item_kinds(DistillConfig, "objectives"),
        "protocols": _item_kinds(EvaluateConfig, "tasks"),
        "publish formats": _literals(PublishConfig, "formats"),
    }


def _item_kinds(model: type[BaseModel], key: str) -> list[str]:
    return [str(kind_of(each)) for each in item_models(model.model_fields[key].annotation)]


def _literals(model: type[BaseModel], key: str) -> list[str]:
    return [
        str(value)
        for option in options(model.model_fields[key].annotation)
        for item in get_args(option)
        for value in get_args(item)
    ]
