"""Help pages of the commands that take a configuration, made from its model."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from flows.cli.schema import Key, is_optional, item_models, keys, kind_of, models, nested, options
from infra.config import Config

_INDENT, _COLUMN = "  ", 30
_LONGEST_DEFAULT = 48


def help_page_text(usage: str, summary: str, notes: Sequence[str], model: type[BaseModel], full: bool) -> str:
    """The help of a command.

    Args:
        usage: the command line behind `fovea`.
        notes: paragraphs below the summary: what the positional words are, recipes, an example.
        full: describe every key; otherwise name those of nested groups.
    """
    top = sorted(keys(model), key=lambda key: key.path[0] in ("out", "restart"))  # what every stage has comes last
    required = [key for key in top if key.is_required]
    single = [key for key in top if not key.is_required and not models(key.annotation)]
    groups = [key for key in top if not key.is_required and models(key.annotation)]
    lines = [f"Usage: fovea {usage}", "", *_wrapped(summary)]
    for note in notes:
        lines += ["", *_wrapped(note)]
    lines += _section("Required", required)
    lines += _section("Settings", single)
    if full:
        for key in (*required, *single, *groups):
            lines += _described(key)
    else:
        lines += _named_groups(groups, usage.split()[0])
    lines += ["", *_wrapped(_FLAGS)]
    return "\n".join(lines)


_FLAGS = (
    "Every key of a YAML file is a flag, and flags win: lists take several values, --KEY null unsets an optional key, "
    "--no-KEY turns one off. --print-config prints the resolved settings as YAML. --help-all describes every key."
)


def _section(title: str, chosen: Sequence[Key]) -> list[str]:
    lines = ["", f"{title}:"] if chosen else []
    for key in chosen:
        lines += _entry(key)
    return lines


def _entry(key: Key) -> list[str]:
    """A flag with its type, its description, its choices and its default."""
    head = f"{_INDENT}{key.flag} {value_name(key.annotation)}".rstrip()
    text = " ".join(part for part in (key.description, _choices(key), _default(key)) if part)
    body = textwrap.wrap(text, max(_width() - _COLUMN, 40))
    first = head.ljust(_COLUMN) + body.pop(0) if len(head) < _COLUMN and body else head
    return [first, *(" " * _COLUMN + line for line in body)]


def value_name(annotation: Any) -> str:
    """A word for the values of a key."""
    kinds = options(annotation)
    for kind in kinds:
        if get_origin(kind) in (list, tuple):
            return f"{value_name(get_args(kind)[0])}..."
        if get_origin(kind) is dict:
            return "NAME=VALUE" if not models(get_args(kind)[1]) else "YAML"
    if models(annotation):
        return "KIND" if all(kind_of(each) for each in models(annotation)) else "YAML"
    if kinds == [bool]:
        return "[true|false]"
    if any(get_origin(kind) is Literal for kind in kinds):
        return "|".join(str(value) for kind in kinds for value in get_args(kind))
    names = {int: "INT", float: "FLOAT", str: "TEXT"}
    return next((names[kind] for kind in kinds if kind in names), "YAML")


def _choices(key: Key) -> str:
    kinds = [kind_of(each) for each in item_models(key.annotation)]
    return f"Kinds: {', '.join(each for each in kinds if each)}." if any(kinds) else ""


def _default(key: Key) -> str:
    if key.is_required:
        return ""
    if key.default is None:
        return "[null]" if is_optional(key.annotation) else ""
    return f"[{to_inline_yaml(key.default)}]"


def to_inline_yaml(value: Any, longest: int = _LONGEST_DEFAULT) -> str:
    """A value in one line as YAML writes it, cut off at `longest` characters; lists of models by their kinds."""
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000).strip().removesuffix("...").strip()
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return getattr(value, "kind", value.model_dump(mode="json", exclude_defaults=True))
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _named_groups(groups: Sequence[Key], command: str) -> list[str]:
    lines = ["", f"Groups of settings (fovea {command} --help-all describes them):"] if groups else []
    for key in groups:
        names = list(dict.fromkeys(each.path[-1] for each in nested(key)))
        members = [kind for each in models(key.annotation) if (kind := kind_of(each))]
        kinds = f"One of {', '.join(members)}. " if len(members) > 1 else ""
        text = f"{key.description} {kinds}Keys: {', '.join(names)}."
        head = f"{_INDENT}{key.flag}.*"
        body = textwrap.wrap(text, max(_width() - _COLUMN, 40))
        first = head.ljust(_COLUMN) + body.pop(0) if len(head) < _COLUMN else head
        lines += [first, *(" " * _COLUMN + line for line in body)]
    return lines


def _described(key: Key) -> Iterator[str]:
    """The keys below one, group by group: of each member of a union, and of each kind of a list's items."""
    own, below = list[Key](), list[Key]()
    for each in nested(key) if models(key.annotation) else ():
        (below if models(each.annotation) else own).append(each)
    for kind in dict.fromkeys(each.kind for each in own):
        title = ".".join(key.path) + (f" (kind {kind})" if kind and len(models(key.annotation)) > 1 else "")
        some = [each for each in own if each.kind == kind and each.path[-1] != "kind"]
        yield from ["", *_wrapped(f"{title}: {_summary(key, kind)}"), *(line for each in some for line in _entry(each))]
    for each in below:
        yield from _described(each)
    for model in item_models(key.annotation):
        title = f"items of {'.'.join(key.path)}" + (f" (kind {kind_of(model)})" if kind_of(model) else "")
        inside = [each for each in keys(model, path=(*key.path, "0")) if each.path[-1] != "kind"]
        yield from [
            "",
            *_wrapped(f"{title}: {_in_one_line(model.__doc__)}"),
            *(line for each in inside for line in _entry(each)),
        ]


def _summary(key: Key, kind: str | None) -> str:
    member = next((each for each in models(key.annotation) if kind_of(each) == kind), None)
    return _in_one_line(member.__doc__) if kind and member is not None else key.description


def _in_one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _width())


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 110)
