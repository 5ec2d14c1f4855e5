"""The configuration that a command line gives: a file or words, and flags over them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from flows.cli import recipes
from flows.cli.commands import Command
from flows.cli.overrides import apply_flags
from flows.cli.schema import keys
from infra.config import Config, describe, load_yaml
from infra.errors import UserError


def resolve_config(command: Command, tokens: Sequence[str]) -> Config:
    """The configuration of a command.

    Args:
        tokens: what stands behind the command's name.

    Raises:
        UserError: a word, a file or a flag is wrong, or something is missing.
    """
    words = list(takewhile(lambda token: not token.startswith("-"), tokens))
    content = apply_flags(command.name, tokens[len(words) :], _content(command, words), command.model)
    try:
        return command.model.model_validate(content)
    except ValidationError as error:
        is_missing = any(problem["type"] == "missing" for problem in error.errors())
        hint = f" (fovea {command.name} --help)" if is_missing else ""
        raise UserError(f"{describe(error, command.model)}{hint}") from None


def to_yaml(config: Config) -> str:
    """A configuration as a file that gives it again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def help_page(command: Command, full: bool) -> str:
    """The help of a command; `full`: with every key at any depth."""
    from flows.cli import help as help_pages

    notes = list(command.notes)
    if command.room is not None:
        names = ", ".join(recipes.recipes_of("pretrain" if command.name == "plan" else command.name))
        notes.insert(0, f"Recipes: {names}. fovea recipes NAME prints one.")
    given = {"model"} if command.name == "eval" else set()
    required = [f"{key.flag} ..." for key in keys(command.model) if key.is_required and key.path[0] not in given]
    usage = " ".join([command.name, command.words, *required, "[--KEY VALUE]..."])
    return help_pages.help_page_text(usage, command.summary, notes, command.model, full)


def _content(command: Command, words: list[str]) -> dict[str, Any]:
    """What the words before the flags give: a file, a recipe, or what is evaluated and how.

    Raises:
        UserError: there are too many, or the file is wrong.
    """
    most = 2 if command.name == "eval" else 1
    if len(words) > most:
        raise UserError(f"{words[most]}: belongs to no flag; usage: fovea {command.name} {command.words} --key value")
    if not words:
        return {}
    content = _evaluated(words) if command.name == "eval" else load_yaml(_path(command, words[0]))
    _check(content, command.model, " ".join(words))
    return content


def _path(command: Command, word: str) -> str:
    return word if command.room is None else recipes.recipe_path(command.room, word)


def _evaluated(words: list[str]) -> dict[str, Any]:
    """What is evaluated and how: a file alone, or a model and a suite."""
    from pretrain.backbones.spec import parse_backbone

    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        return load_yaml(words[0])
    content: dict[str, Any] = {"model": parse_backbone(words[0])}
    if len(words) > 1:
        content |= load_yaml(words[1]) if words[1].endswith((".yaml", ".yml")) else {"suite": words[1]}
    return content


def _check(content: dict[str, Any], model: type[BaseModel], file: str) -> None:
    """Report what is wrong in the file itself; what is missing there may still come from a flag."""
    try:
        model.model_validate(content)
    except ValidationError as error:
        problems = error.errors()
        if any(problem["type"] != "missing" for problem in problems) and all(problem["loc"] for problem in problems):
            raise UserError(f"{file}: {describe(error, model)}") from None
