"""The reference of all settings as Markdown: one table a configuration, made from the models.

`python -m flows.cli.reference docs/reference` writes it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flows.cli.commands import COMMANDS
from flows.cli.help import to_inline_yaml
from flows.cli.schema import REQUIRED, Key, keys, kind_of

_TITLES = {
    "infra": "Launching",
    "pretrain": "Pretraining",
    "curation": "Curation",
    "distill": "Distillation and publishing",
    "eval": "Evaluation",
    "flows": "Pipelines",
}
"""Title of each room's page."""
_NOTE = "<!-- Made from the models by `make reference`; edit the docstrings of the models instead. -->"
_LONGEST_DEFAULT = 120
_BOUNDS = {
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "≤"),
    annotated_types.Lt: ("lt", "<"),
}


def reference_pages() -> dict[str, str]:
    """Markdown of every page by file name: a page for each room, a section for each of its configurations."""
    found = list(_reachable([command.model for command in COMMANDS.values()]))
    own = {command.model for command in COMMANDS.values()}
    found.sort(key=lambda model: model not in own)  # stable: the settings of commands come first
    return {f"{room}.md": _page(room, [model for model in found if _room(model) == room]) for room in _TITLES}


def write_reference(folder: Path) -> None:
    """Write the pages, and remove those that no longer exist."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = reference_pages()
    for path in folder.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")


def _reachable(models: Sequence[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    """The models and those of their keys, each once, parents before their keys."""
    seen: set[type[BaseModel]] = set()
    left = list(models)
    while left:
        model = left.pop(0)
        if model in seen:
            continue
        seen.add(model)
        yield model
        left[:0] = [each for field in model.model_fields.values() for each in _models_within(field.annotation)]


def _models_within(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for each in get_args(annotation) for model in _models_within(each)]


def _room(model: type[BaseModel]) -> str:
    return model.__module__.split(".")[0]


def _page(room: str, models: Sequence[type[BaseModel]]) -> str:
    lines = [f"# {_TITLES[room]}: reference", "", _NOTE, ""]
    commands = [command for command in COMMANDS.values() if _room(command.model) == room]
    if commands:
        lines += ["| Command | Settings |", "| --- | --- |"]
        lines += [f"| `fovea {each.name}` | {_link(each.model, room)} |" for each in commands]
        lines.append("")
    for model in models:
        lines += _section(model, room)
    return "\n".join(lines)


def _section(model: type[BaseModel], room: str) -> list[str]:
    lines = [f"## {model.__name__}", "", *_paragraphs(model.__doc__)]
    if kind := kind_of(model):
        lines += [f"`kind: {kind}`", ""]
    shown = [key for key in keys(model) if key.path[0] != "kind"]
    if shown:
        lines += ["| Key | Type | Default | Effect |", "| --- | --- | --- | --- |"]
        lines += [_row(key, model.model_fields[key.path[0]], room) for key in shown]
        lines.append("")
    return lines


def _paragraphs(text: str | None) -> list[str]:
    return [line for part in (text or "").split("\n\n") for line in (" ".join(part.split()), "")]


def _row(key: Key, field: FieldInfo, room: str) -> str:
    cells = [f"`{key.path[0]}`", _type(field.annotation, room) + _bounds(field), _default(key), key.description]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _type(annotation: Any, room: str) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], room)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type(each, room) for each in arguments))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {_type(arguments[0], room)}"
    if origin is dict:
        return f"mapping to {_type(arguments[1], room)}"
    if origin is tuple:
        return f"{len(arguments)} × {_type(arguments[0], room)}"
    if annotation in (None, NoneType):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _link(annotation, room)
    return {str: "text", int: "int", float: "float", bool: "true or false"}.get(annotation, "YAML")


def _link(model: type[BaseModel], room: str) -> str:
    page = "" if _room(model) == room else f"{_room(model)}.md"
    return f"[{model.__name__}]({page}#{model.__name__.lower()})"


def _bounds(field: FieldInfo) -> str:
    """The limits of a number, as in `≥ 1, < 2`."""
    limits = [
        f"{sign} {getattr(each, name):g}"
        for each in field.metadata
        for kind, (name, sign) in _BOUNDS.items()
        if isinstance(each, kind)
    ]
    return f" {', '.join(limits)}" if limits else ""


def _default(key: Key) -> str:
    if key.default is REQUIRED:
        return "required"
    if key.default is None:
        return "null"
    text = to_inline_yaml(key.default, _LONGEST_DEFAULT)
    return "" if text in ("{}", "''") else f"`{text}`"


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
